"""The contract with torch: functional ops with schemas, fakes and autograd, used where a call is traced."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qlae_kernels.latent_quantize import Call, cached_call, check_tensors, for_kernels, gradients_of
from qlae_kernels.latent_quantize_onnx import decomposed_latent_quantize
from qlae_kernels.latent_quantize_transforms import (
    Options,
    batched_latent_quantize,
    gradients_at,
    transformed_latent_quantize,
)
from qlae_kernels.problem import as_dense, compute_dtype_of, memory_order
from qlae_kernels.torch_internals import are_functorch_transforms_active


def traced_latent_quantize(z: Tensor, codebook: Tensor, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """`latent_quantize` where a call is traced or transformed; without `return_indices` the indices mean nothing."""
    check_tensors(z, codebook)
    if torch.onnx.is_in_onnx_export():
        return decomposed_latent_quantize(z, codebook, options)
    if are_functorch_transforms_active():
        return transformed_latent_quantize(z, codebook, options)
    return latent_quantize_op(z, codebook, *options)


def _call(z: Tensor, codebook: Tensor, levels: list[int] | None, *arguments: Any) -> Call:
    return cached_call(
        z.shape,
        z.dtype,
        z.device,
        codebook.shape,
        codebook.dtype,
        codebook.device,
        None if levels is None else tuple(levels),
        *arguments,
        memory_order(z),
    )


@torch.library.custom_op("qlae::latent_quantize", mutates_args=())
def latent_quantize_op(
    z: Tensor,
    codebook: Tensor,
    levels: list[int] | None,
    channel_dim: int,
    quantization_weight: float,
    commitment_weight: float,
    index_dtype: torch.dtype,
    return_indices: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """`latent_quantize` as an op; without `return_indices` the indices are empty."""
    z = as_dense(z)
    call = _call(
        z,
        codebook,
        levels,
        channel_dim,
        quantization_weight,
        commitment_weight,
        index_dtype,
        return_indices,
        backend,
    )
    quantized, indices, loss = call.forward(z, for_kernels(codebook, call))
    return quantized, z.new_empty(0, dtype=index_dtype) if indices is None else indices, loss


@latent_quantize_op.register_fake
def _(
    z: Tensor,
    codebook: Tensor,
    levels: list[int] | None,
    channel_dim: int,
    quantization_weight: float,
    commitment_weight: float,
    index_dtype: torch.dtype,
    return_indices: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    indices = torch.empty_like(z, dtype=index_dtype) if return_indices else z.new_empty(0, dtype=index_dtype)
    return torch.empty_like(z), indices, z.new_empty((), dtype=compute_dtype_of(z.dtype))


@torch.library.custom_op("qlae::latent_quantize_backward", mutates_args=())
def latent_quantize_backward_op(
    z: Tensor,
    codebook: Tensor,
    grad_quantized: Tensor,
    grad_loss: Tensor,
    levels: list[int] | None,
    channel_dim: int,
    quantization_weight: float,
    commitment_weight: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The gradients of z and of the codebook, each in its own dtype."""
    z = as_dense(z)
    call = _call(z, codebook, levels, channel_dim, quantization_weight, commitment_weight, torch.int64, False, backend)
    with torch.no_grad():
        return gradients_of(call, z, codebook, grad_quantized, grad_loss)


@latent_quantize_backward_op.register_fake
def _(
    z: Tensor,
    codebook: Tensor,
    grad_quantized: Tensor,
    grad_loss: Tensor,
    levels: list[int] | None,
    channel_dim: int,
    quantization_weight: float,
    commitment_weight: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(z), codebook.new_empty(codebook.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    z, codebook, levels, channel_dim, quantization_weight, commitment_weight, _, _, backend = inputs
    ctx.save_for_backward(z, codebook)
    ctx.arguments = (levels, channel_dim, quantization_weight, commitment_weight, backend)


def _backward(ctx: Any, grad_quantized: Tensor, _: Tensor | None, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
    z, codebook = ctx.saved_tensors
    gradients = latent_quantize_backward_op(z, codebook, grad_quantized, grad_loss, *ctx.arguments)
    return (*gradients, None, None, None, None, None, None, None)


latent_quantize_op.register_autograd(_backward, setup_context=_setup_context)
latent_quantize_op.register_vmap(batched_latent_quantize)


def _setup_context_of_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, levels, channel_dim, quantization_weight, commitment_weight, backend = inputs
    ctx.save_for_backward(*tensors)
    ctx.arguments = (levels, channel_dim, quantization_weight, commitment_weight, backend)


def _backward_of_backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    levels, channel_dim, *weights, backend = ctx.arguments
    tensors = ctx.saved_tensors
    options = Options(levels, channel_dim, *weights, torch.int64, True, backend)
    with torch.no_grad():
        _, indices, _ = latent_quantize_op(*tensors[:2], *options)
    with torch.enable_grad():
        # Of copies: the graph that leads to the saved tensors is not this function's to walk.
        inputs = [tensor.view_as(tensor) for tensor in tensors]
        outputs = gradients_at(indices, *inputs, channel_dim, *weights)
    again = torch.autograd.grad(outputs, inputs, grads, create_graph=torch.is_grad_enabled(), allow_unused=True)
    return (*again, None, None, None, None, None)


latent_quantize_backward_op.register_autograd(_backward_of_backward, setup_context=_setup_context_of_backward)
