"""Counters by which the blocks of one launch learn that they are the last, for the GPU backends."""

from __future__ import annotations

import torch
from torch import Tensor

# Of one launch. Kernels leave every counter at 0, as they found it.
COUNTERS_PER_LAUNCH = 4096

_counters: dict[tuple[torch.device, int], Tensor] = {}


def counters(device: torch.device, stream: int) -> Tensor:
    """Zeros, int32 [COUNTERS_PER_LAUNCH], that no launch on another stream of `device` uses.

    Launches on one stream follow one another and share them. A launch that is captured into a CUDA graph may later
    run beside any other, so it gets counters of its own, which the graph sets to zero.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return torch.zeros(COUNTERS_PER_LAUNCH, dtype=torch.int32, device=device)
    kept = _counters.get((device, stream))
    if kept is None:
        kept = _counters[device, stream] = torch.zeros(COUNTERS_PER_LAUNCH, dtype=torch.int32, device=device)
    return kept
