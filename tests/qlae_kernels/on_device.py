"""Lets tests that make and compare CPU tensors call the backends that serve GPUs alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import qlae_kernels
from qlae_kernels.backends import BACKENDS

CPU = torch.device("cpu")


def device_of(backend: str) -> torch.device:
    """Where the tensors of a call to `backend` are to be: the CPU if it serves it or there is no GPU, else the GPU."""
    serves_cpu = backend not in BACKENDS or "cpu" in BACKENDS[backend].DEVICE_TYPES
    return CPU if serves_cpu or not torch.cuda.is_available() else torch.device("cuda", torch.cuda.current_device())


def storage_bytes(tensor: Tensor) -> Tensor:
    """All bytes of the tensor's memory, those between and around its elements included; uint8 [bytes]."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def copied(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on `device` whose elements lie in its memory as they did: offset, strides, gaps, overlap and sign bit."""
    if tensor.layout is not torch.strided:
        return tensor.to(device)
    memory = storage_bytes(tensor).to(device, copy=True).untyped_storage()
    copy = torch.empty(0, dtype=tensor.dtype, device=device)
    copy.set_(memory, tensor.storage_offset(), tensor.size(), tensor.stride())
    return torch._neg_view(copy) if tensor.is_neg() else copy


class Transfer(torch.autograd.Function):
    """`copied`, differentiable as often as wanted; gradients come back as they lie in memory, too."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, device: torch.device) -> Tensor:
        ctx.device = tensor.device
        ctx.set_materialize_grads(False)
        return copied(tensor, device)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None]:
        return None if grad is None else Transfer.apply(grad, ctx.device), None


def to_device(value: Any, device: torch.device) -> Any:
    """A tensor with memory as `Transfer` makes it; anything else, or one that is there already, as it is."""
    if not isinstance(value, Tensor) or value.device.type in (device.type, "meta"):
        return value
    return Transfer.apply(value, device)


def on_backend(value: Tensor, backend: str) -> Tensor:
    """The tensor, or a leaf like it where `backend` serves another device."""
    placed = to_device(value.detach(), device_of(backend))
    return value if placed.device == value.device else placed.requires_grad_(value.requires_grad)


def call_on(device: torch.device, function: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[Any, ...]:
    """function(*arguments, **options) with its tensors on `device`, and its results where the tests are.

    Where a tensor was moved, its copy must come out of the call as it went in.
    """
    if device == CPU:
        return function(*arguments, **options)
    placed = [to_device(argument, device) for argument in arguments]
    results = function(*placed, **options)
    for original, copy in zip(arguments, placed, strict=True):
        if copy is not original and copy.layout is torch.strided:
            assert torch.equal(storage_bytes(copy.detach()).cpu(), storage_bytes(original.detach()))
    return tuple(to_device(result, CPU) for result in results)


def latent_quantize(z: Any, codebook: Any, *, backend: str, **options: Any) -> qlae_kernels.LatentQuantizerOutput:
    """`qlae_kernels.latent_quantize`; tensors are moved to the device that `backend` serves, and the results back."""
    device = device_of(backend)
    results = call_on(device, qlae_kernels.latent_quantize, z, codebook, backend=backend, **options)
    return qlae_kernels.LatentQuantizerOutput(*results)
