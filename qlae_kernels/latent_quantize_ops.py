"""The contract with torch: functional ops with schemas, fakes and autograd, used where a call is traced."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qlae_kernels.latent_quantize import (
    Call,
    cached_call,
    check_call,
    check_strided,
    check_tensors,
    for_kernels,
    gradients_of,
)
from qlae_kernels.latent_quantize_onnx import decomposed_latent_quantize
from qlae_kernels.latent_quantize_transforms import (
    batched_latent_quantize,
    gradients_at,
    transformed_latent_quantize,
)
from qlae_kernels.problem import Options, as_dense, compute_dtype_of, memory_order
from qlae_kernels.torch_internals import are_functorch_transforms_active

# The fields of `Options`.
_OPTIONS = (
    "int[]? levels, int channel_dim, float quantization_weight, float commitment_weight, ScalarType index_dtype, "
    "bool return_indices, str backend"
)
# `torch.library.custom_op` would make them from signatures that list the options again, and its calls take longer.
_LIBRARY = torch.library.Library("qlae", "FRAGMENT")
_LIBRARY.define(
    f"latent_quantize(Tensor z, Tensor codebook, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
_LIBRARY.define(
    "latent_quantize_backward(Tensor z, Tensor codebook, Tensor? grad_quantized, Tensor grad_loss, "
    f"bool need_grad_z, bool need_grad_codebook, {_OPTIONS}) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)

# (z, codebook, *options) -> (quantized, indices, loss); without `return_indices` the indices are empty.
latent_quantize_op = torch.ops.qlae.latent_quantize.default
# (z, codebook, grad_quantized, grad_loss, need_grad_z, need_grad_codebook, *options) -> the gradients of z and of the
# codebook, each in its own dtype; empty where not needed.
latent_quantize_backward_op = torch.ops.qlae.latent_quantize_backward.default


def traced_latent_quantize(
    z: Tensor, codebook: Tensor, options: Options, counts: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """`latent_quantize` where a call is traced or transformed.

    `counts`, which broadcasts with z, is False at elements that equal their code and have no part in any derivative.
    """
    check_tensors(z, codebook)
    check_strided("z", z)
    check_strided("codebook", codebook)
    if torch.onnx.is_in_onnx_export():
        quantized, indices, loss = decomposed_latent_quantize(z, codebook, options)
    elif are_functorch_transforms_active():
        quantized, indices, loss = transformed_latent_quantize(z, codebook, options, counts)
    else:
        quantized, indices, loss = latent_quantize_op(z, codebook, *options)
    return quantized, indices if options.return_indices else None, loss


def op_gradients(
    z: Tensor,
    codebook: Tensor,
    grad_quantized: Tensor | None,
    grad_loss: Tensor,
    need_grad_z: bool,
    need_grad_codebook: bool,
    options: Options,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of z and of the codebook by the backward op; None where not needed."""
    grad_z, grad_codebook = latent_quantize_backward_op(
        z, codebook, grad_quantized, grad_loss, need_grad_z, need_grad_codebook, *options
    )
    return grad_z if need_grad_z else None, grad_codebook if need_grad_codebook else None


def _call(z: Tensor, codebook: Tensor, options: Options) -> Call:
    return cached_call(
        z.shape,
        z.dtype,
        z.device,
        codebook.shape,
        codebook.dtype,
        codebook.device,
        options,
        None if z.is_contiguous() else memory_order(z),
    )


def _options(levels: list[int] | None, *others: Any) -> Options:
    return Options(None if levels is None else tuple(levels), *others)


def _check(z: Tensor, codebook: Tensor, options: Options) -> None:
    check_call(z.shape, z.dtype, z.device, codebook.shape, codebook.dtype, codebook.device, options)


def _forward_kernel(z: Tensor, codebook: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    z = as_dense(z)
    call = _call(z, codebook, _options(*options))
    quantized, indices, loss = call.forward(z, for_kernels(codebook, call))
    return quantized, z.new_empty(0, dtype=call.options.index_dtype) if indices is None else indices, loss


def _forward_fake(z: Tensor, codebook: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    options = _options(*options)
    _check(z, codebook, options)
    index_dtype = options.index_dtype
    indices = torch.empty_like(z, dtype=index_dtype) if options.return_indices else z.new_empty(0, dtype=index_dtype)
    return torch.empty_like(z), indices, z.new_empty((), dtype=compute_dtype_of(z.dtype))


def _forward_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    z, codebook, *options = inputs
    ctx.save_for_backward(z, codebook)
    ctx.set_materialize_grads(False)
    ctx.options = Options(*options)


def _forward_backward(
    ctx: Any, grad_quantized: Tensor | None, _: Tensor | None, grad_loss: Tensor | None
) -> tuple[Tensor | None, ...]:
    need_grad_z, need_grad_codebook, *_ = ctx.needs_input_grad
    without_gradient = (None,) * len(ctx.options)
    if grad_loss is None:
        # As in the eager path: straight-through alone.
        return grad_quantized if need_grad_z else None, None, *without_gradient
    gradients = op_gradients(
        *ctx.saved_tensors, grad_quantized, grad_loss, need_grad_z, need_grad_codebook, ctx.options
    )
    return *gradients, *without_gradient


def _backward_kernel(
    z: Tensor,
    codebook: Tensor,
    grad_quantized: Tensor | None,
    grad_loss: Tensor,
    need_grad_z: bool,
    need_grad_codebook: bool,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    z = as_dense(z)
    call = _call(z, codebook, _options(*options))
    with torch.no_grad():
        gradients = gradients_of(call, z, codebook, grad_quantized, grad_loss, need_grad_z, need_grad_codebook)
    grad_z, grad_codebook = gradients
    return (
        z.new_empty(0) if grad_z is None else grad_z,
        codebook.new_empty(0) if grad_codebook is None else grad_codebook,
    )


def _backward_fake(
    z: Tensor,
    codebook: Tensor,
    grad_quantized: Tensor | None,
    grad_loss: Tensor,
    need_grad_z: bool,
    need_grad_codebook: bool,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    _check(z, codebook, _options(*options))
    return (
        torch.empty_like(z) if need_grad_z else z.new_empty(0),
        codebook.new_empty(codebook.shape if need_grad_codebook else 0),
    )


def _backward_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, need_grad_z, need_grad_codebook = inputs[:6]
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)
    ctx.needed = (need_grad_z, need_grad_codebook)
    ctx.options = Options(*inputs[6:])


def _backward_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    tensors, options = ctx.saved_tensors, ctx.options
    needs = ctx.needs_input_grad[: len(tensors)]
    with torch.no_grad():
        _, indices, _ = latent_quantize_op(*tensors[:2], *options._replace(return_indices=True))
    with torch.enable_grad():
        # Of copies: the graph that leads to the saved tensors is not this function's to walk.
        copies = [None if tensor is None else tensor.view_as(tensor) for tensor in tensors]
        outputs = gradients_at(indices, *copies, options)
    given = [
        (output, grad)
        for output, grad, was_needed in zip(outputs, grads, ctx.needed, strict=True)
        if was_needed and grad is not None and output.requires_grad
    ]
    again = iter(
        torch.autograd.grad(
            [output for output, _ in given],
            [copy for copy, need in zip(copies, needs, strict=True) if need],
            [grad for _, grad in given],
            create_graph=torch.is_grad_enabled(),
            allow_unused=True,
        )
        if given
        else ()
    )
    return *(next(again, None) if need else None for need in needs), *(None,) * (2 + len(options))


for _op, _kernel, _fake, _setup_context, _backward in (
    (latent_quantize_op, _forward_kernel, _forward_fake, _forward_setup_context, _forward_backward),
    (latent_quantize_backward_op, _backward_kernel, _backward_fake, _backward_setup_context, _backward_backward),
):
    _LIBRARY.impl(_op, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(_op, _fake, lib=_LIBRARY)
    torch.library.register_autograd(_op, _backward, setup_context=_setup_context, lib=_LIBRARY)
torch.library.register_vmap(latent_quantize_op, batched_latent_quantize, lib=_LIBRARY)
