"""What this package uses of PyTorch's private names, in one place; no public one does the same as fast.

Importing the package needs none of them: where a release of PyTorch lacks one, the calls that need it say so.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import torch
from torch.utils import _pytree


def _function_of_torch(name: str) -> Callable[..., Any]:
    """`torch._C.<name>` itself, which costs a call nothing; where there is none, a function that raises."""

    def missing(*_: Any) -> NoReturn:
        raise RuntimeError(
            f"this call needs torch._C.{name}, which this build of torch {torch.__version__} lacks; install a release "
            "that has it (2.10 to 2.14 have), or a newer qlae-kernels"
        )

    return getattr(torch._C, name, missing)


# () -> bool: whether a transform of torch.func is at work. Its tensors are of type Tensor and look like others.
are_functorch_transforms_active = _function_of_torch("_are_functorch_transforms_active")
# () -> int: how many dispatch modes (fake tensors, make_fx, counters of operations) are at work.
dispatch_modes = _function_of_torch("_len_torch_dispatch_stack")
# () -> bool: whether torch.jit.trace is recording.
is_jit_tracing = _function_of_torch("_is_tracing")
# () -> bool: whether torch.autograd takes many gradients at a time (`is_grads_batched=True`). Its tensors are of type
# Tensor, too, and have no memory.
are_gradients_batched = (
    partial(_function_of_torch("_dispatch_tls_is_dispatch_key_included"), torch._C._dispatch_key_parse("VmapMode"))
    if hasattr(torch._C, "_dispatch_key_parse")
    else _function_of_torch("_dispatch_key_parse")
)
# (index of a GPU) -> int: the stream that torch uses now; `torch.cuda.current_stream` makes an object, which takes
# longer. Builds for the CPU alone have none.
current_raw_stream = _function_of_torch("_cuda_getCurrentRawStream")


def register_namedtuple(kind: type, serialized_type_name: str) -> None:
    """Let torch.export save programs that take or return the named tuple `kind`; warns where PyTorch has no way to."""
    register = getattr(_pytree, "_register_namedtuple", None)
    if register is None:
        warnings.warn(
            f"torch {torch.__version__} has no torch.utils._pytree._register_namedtuple: torch.export.save will refuse "
            f"programs that return {kind.__name__}; all else works",
            RuntimeWarning,
            stacklevel=2,
        )
        return
    register(kind, serialized_type_name=serialized_type_name)
