"""Small tensors of the GPU backends that outlive a call: counters of blocks, and numbers of codes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Lock

import torch
from torch import Tensor

# By which the blocks of one launch learn that they are the last; of one launch at most. Kernels leave every counter at
# 0, as they found it.
COUNTERS_PER_LAUNCH = 4096

# Set aside per device for launches that are captured into CUDA graphs: 4 MiB.
_COUNTERS_FOR_GRAPHS = 1 << 20

_of_stream: dict[tuple[torch.device, int], Tensor] = {}
_for_graphs: dict[torch.device, Tensor] = {}
_giving_out = Lock()


def counters(device: torch.device, stream: int, count: int = COUNTERS_PER_LAUNCH) -> Tensor:
    """At least `count` zeros, int32, on `device`, that no launch on another stream uses.

    Launches on one stream follow one another and share them. A launch that is captured into a CUDA graph may later
    run beside any other, so it gets counters that no other launch ever gets; when those that were set aside have all
    been given out, the graph clears new ones before each launch.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return _for_captured_launch(device, count)
    found = _of_stream.get((device, stream))
    if found is None:
        found = _of_stream[device, stream] = kept(device, lambda: _zeros(device, COUNTERS_PER_LAUNCH))
        if device.type == "cuda" and device not in _for_graphs:
            _for_graphs[device] = kept(device, lambda: _zeros(device, _COUNTERS_FOR_GRAPHS))
    return found


def kept(device: torch.device, make: Callable[[], Tensor]) -> Tensor:
    """What `make` returns, a tensor on `device`, in memory that may be kept, and ready for every stream.

    Where torch.compile makes CUDA graphs, what this thread allocates belongs to the graphs, which end with an error
    when it outlives a call; what another thread allocates does not.
    """
    if device.type != "cuda":
        return make()

    def make_and_wait() -> Tensor:
        tensor = make()
        torch.cuda.current_stream(device).synchronize()
        return tensor

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(make_and_wait).result()


def _for_captured_launch(device: torch.device, count: int) -> Tensor:
    with _giving_out:
        left = _for_graphs.get(device)
        if left is not None and left.numel() >= count:
            _for_graphs[device] = left[count:]
            return left[:count]
    return _zeros(device, count)


def _zeros(device: torch.device, count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int32, device=device)


def levels_on(device: torch.device, levels: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """`levels` (on the CPU) as a tensor of `dtype` on `device`, copied once: a copy cannot be captured in a graph."""
    return None if levels is None else _kept_levels(device, tuple(levels.tolist()), dtype)


# A captured graph knows only the address, so they are never dropped.
@cache
def _kept_levels(device: torch.device, levels: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return kept(device, lambda: torch.tensor(levels, dtype=dtype, device=device))
