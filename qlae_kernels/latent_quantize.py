"""The op `latent_quantize`: checks, the autograd.Function, and the public functional form."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from operator import index
from typing import Any, NamedTuple, SupportsFloat

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.nn import Parameter

from qlae_kernels import latent_quantize_reference
from qlae_kernels.backends import select_backend
from qlae_kernels.mask import check_mask, counting, fill, mean_over_mask
from qlae_kernels.problem import (
    INDEX_DTYPES,
    VALUE_DTYPES,
    Backend,
    Backward,
    Forward,
    Options,
    Problem,
    as_dense,
    has_strides_of,
    layout_of,
    memory_order,
)
from qlae_kernels.torch_internals import (
    are_functorch_transforms_active,
    are_gradients_batched,
    dispatch_modes,
    is_jit_tracing,
    register_namedtuple,
)

_PLAIN_TENSORS = (Tensor, Parameter)


class LatentQuantizerOutput(NamedTuple):
    """What quantizing z returns; unpacks in three.

    quantized: the nearest codes, of z's shape and dtype.
    indices: their positions in the codebook, of z's shape and the chosen integer dtype; None if not asked for.
    loss: (quantization_weight + commitment_weight) * mean((z - quantized)^2), no dimensions, float32 (float64 for z
        of float64). Its gradient reaches z scaled by commitment_weight and the codebook by quantization_weight.
    """

    quantized: Tensor
    indices: Tensor | None
    loss: Tensor


# Lets torch.export save programs that return it.
register_namedtuple(LatentQuantizerOutput, "qlae_kernels.LatentQuantizerOutput")


def latent_quantize(
    z: Tensor,
    codebook: Tensor,
    *,
    levels: Iterable[int] | None = None,
    channel_dim: int = 1,
    quantization_weight: float = 0.01,
    commitment_weight: float = 0.01,
    index_dtype: torch.dtype = torch.int32,
    return_indices: bool = True,
    mask: Tensor | None = None,
    backend: str = "auto",
) -> LatentQuantizerOutput:
    """Map every latent to the nearest code of its own scalar codebook (arXiv 2305.18378, section 3).

    Forward, per element of latent d, in float32 (float64 for z of float64):
        index = min argmin_k |z - codebook[d, k]|;  quantized = codebook[d, index]
        loss = (quantization_weight + commitment_weight) * mean((z - quantized)^2)
    Backward, with M elements, g the gradient of `quantized` (straight-through) and gl that of `loss`:
        grad z = g + gl * commitment_weight * 2/M * (z - quantized)
        grad codebook[d, k] = gl * quantization_weight * 2/M * sum over {index = k} of (codebook[d, k] - z)

    Args:
        z: latents [..., D, ...] with the D latents at `channel_dim`; float32, float64, float16 or bfloat16.
        codebook: codes [D, K], or [1, K] for one codebook shared by all latents; on z's device. Need not be sorted.
        levels: the number of codes of each latent (D whole numbers of 1..K, in a sequence, an array or a tensor); the
            rest of a row is ignored. None: K for all.
        channel_dim: the dimension of z that counts the latents.
        quantization_weight: weight of the loss whose gradient moves the codes towards z.
        commitment_weight: weight of the loss whose gradient moves z towards the codes. Both weights are finite numbers
            >= 0. A compiled call has its weights compiled in; to vary one often, set both to 1 and scale `loss`.
        index_dtype: torch.uint8, int16, int32 or int64; must hold K - 1.
        return_indices: False leaves `indices` out (None) and saves writing them.
        mask: bool, of z's shape without `channel_dim`, on z's device. Where it is False, z is not looked at, whatever
            it holds: `quantized` and `indices` are 0, no gradient flows, and the loss is the mean over the other
            positions (0 if there are none). It costs passes over z of its own.
        backend: "auto", "cpu", "reference", "triton" or "cuda".

    A z that is NaN or infinite yields index 0, NaN in `quantized`, and a NaN or infinite loss.

    Raises:
        TypeError: z or codebook is not a dense tensor or of a dtype that is not supported, or another argument is of a
            wrong type.
        ValueError: shapes, devices, levels or weights do not fit, or `index_dtype` is too small.
        RuntimeError: the named backend is not available; the message says why and what to do.
    """
    if levels is not None:
        levels = _as_levels(levels)
    # Numbers, not tensors that could change under the cache's key.
    if type(quantization_weight) is not float or type(commitment_weight) is not float:
        quantization_weight = as_weight("quantization_weight", quantization_weight)
        commitment_weight = as_weight("commitment_weight", commitment_weight)
    options = (
        levels,
        channel_dim,
        quantization_weight,
        commitment_weight,
        index_dtype,
        return_indices,
        backend,
    )
    if mask is not None:
        return _quantize_masked(z, codebook, mask, Options._make(options))
    if (
        is_dynamo_compiling()
        or are_functorch_transforms_active()
        or dispatch_modes()
        or is_jit_tracing()
        or type(z) not in _PLAIN_TENSORS
        or type(codebook) not in _PLAIN_TENSORS
    ):
        # What is traced or transformed is to see an op; kernels called past the dispatcher would stay hidden.
        from qlae_kernels.latent_quantize_ops import traced_latent_quantize

        return LatentQuantizerOutput._make(traced_latent_quantize(z, codebook, Options._make(options)))
    contiguous = z.is_contiguous() and not z.is_neg()
    if not contiguous:
        check_strided("z", z)
        z = as_dense(z)
    call = cached_call(
        z.shape,
        z.dtype,
        z.device,
        codebook.shape,
        codebook.dtype,
        codebook.device,
        options,
        None if contiguous else memory_order(z),
    )
    return LatentQuantizerOutput._make(LatentQuantizeFunction.apply(z, codebook, call))


def _quantize_masked(z: Tensor, codebook: Tensor, mask: Tensor, options: Options) -> LatentQuantizerOutput:
    check_tensors(z, codebook)
    check_shapes(z.shape, codebook.shape, options.channel_dim)
    check_mask(mask, z.shape, options.channel_dim, z.device)
    counts = counting(mask, z, options.channel_dim)
    filled = fill(z, codebook, counts, options.channel_dim)
    if are_functorch_transforms_active():
        from qlae_kernels.latent_quantize_ops import traced_latent_quantize

        output = LatentQuantizerOutput._make(traced_latent_quantize(filled, codebook, options, counts))
    else:
        output = latent_quantize(filled, codebook, **options._asdict())
    # `masked_fill` would make the result contiguous.
    quantized = torch.where(counts, output.quantized.to(z.dtype), 0)
    indices = None if output.indices is None else torch.where(counts, output.indices, 0)
    return LatentQuantizerOutput(quantized, indices, mean_over_mask(output.loss, mask))


class Call(NamedTuple):
    """A checked call: the problem, and the two functions of the backend that solve it."""

    problem: Problem
    forward: Forward
    backward: Backward
    # False where the codebook has another dtype than the kernels compute in.
    codebook_fits: bool
    # Whether z is contiguous; else it is dense in another order.
    contiguous: bool
    options: Options


class LatentQuantizeFunction(torch.autograd.Function):
    """The eager path: kernels called past the dispatcher. Saves z and the codebook, nothing else."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, codebook: Tensor, call: Call) -> tuple[Tensor, Tensor | None, Tensor]:
        ctx.save_for_backward(z, codebook)
        ctx.set_materialize_grads(False)
        codes = for_kernels(codebook, call)
        ctx.call, ctx.plain = call, codes is codebook and call.contiguous
        return call.forward(z, codes)

    @staticmethod
    def backward(
        ctx: Any, grad_quantized: Tensor | None, _: None, grad_loss: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None]:
        z, codebook = ctx.saved_tensors
        need_grad_z, need_grad_codebook, _ = ctx.needs_input_grad
        if grad_loss is None:
            # Straight-through alone: z receives the gradient of `quantized` as it is, the codebook none.
            return grad_quantized if need_grad_z else None, None, None
        call = ctx.call
        if is_dynamo_compiling() or are_functorch_transforms_active() or are_gradients_batched():
            # Compiled autograd, or many gradients at a time: as in `latent_quantize`, an op is to be seen.
            from qlae_kernels.latent_quantize_ops import op_gradients

            gradients = op_gradients(
                z, codebook, grad_quantized, grad_loss, need_grad_z, need_grad_codebook, call.options
            )
            return (*gradients, None)
        usual = (
            ctx.plain
            and grad_quantized is not None
            and grad_quantized.is_contiguous()
            and not (grad_quantized.is_neg() or grad_loss.is_neg() or torch.is_grad_enabled())
        )
        if usual:
            # What `gradients_of` comes to, without its calls: they are 2 % of a small batch's time.
            return (
                *call.backward(z, codebook, grad_quantized, grad_loss, need_grad_z, need_grad_codebook),
                None,
            )
        gradients = gradients_of(call, z, codebook, grad_quantized, grad_loss, need_grad_z, need_grad_codebook)
        return (*gradients, None)


def for_kernels(codebook: Tensor, call: Call) -> Tensor:
    """The codebook, contiguous and in the compute dtype."""
    if call.codebook_fits and codebook.is_contiguous() and not codebook.is_neg():
        return codebook
    check_strided("codebook", codebook)
    return codebook.to(call.problem.compute_dtype).resolve_neg().contiguous()


def gradients_of(
    call: Call,
    z: Tensor,
    codebook: Tensor,
    grad_quantized: Tensor | None,
    grad_loss: Tensor,
    need_grad_z: bool = True,
    need_grad_codebook: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of a dense z and of the codebook, each in its own dtype; None where not needed."""
    backward = call.backward
    if torch.is_grad_enabled():
        # A gradient of the gradient is wanted: plain PyTorch records it.
        backward = latent_quantize_reference.prepare(call.problem)[1]
    else:
        if grad_loss.is_neg():
            grad_loss = grad_loss.resolve_neg()
        if grad_quantized is not None and not has_strides_of(grad_quantized, z):
            grad_quantized = torch.empty_like(z).copy_(grad_quantized)
    codes = for_kernels(codebook, call)
    grad_z, grad_codebook = backward(z, codes, grad_quantized, grad_loss, need_grad_z, need_grad_codebook)
    if not call.codebook_fits and grad_codebook is not None:
        grad_codebook = grad_codebook.to(codebook.dtype)
    return grad_z, grad_codebook


def check_tensors(z: Tensor, codebook: Tensor) -> None:
    """Raise TypeError unless both are tensors."""
    for name, value in (("z", z), ("codebook", codebook)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor; got {type(value).__name__}")


def check_strided(name: str, value: Tensor) -> None:
    """Raise TypeError for a sparse tensor or another without plain memory."""
    if value.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor (layout torch.strided); got layout {value.layout}")


def make_call(
    shape: torch.Size,
    dtype: torch.dtype,
    device: torch.device,
    codebook_shape: torch.Size,
    codebook_dtype: torch.dtype,
    codebook_device: torch.device,
    options: tuple[Any, ...],
    order: tuple[int, ...] | None = None,
) -> Call:
    """Check a call and prepare what is the same in all calls like it.

    `options` are the fields of `Options`, `levels` being None or a tuple. `order` holds z's dimensions from the slowest
    to the fastest in memory; None where z is contiguous.
    """
    options = Options._make(options)
    backend = check_call(shape, dtype, device, codebook_shape, codebook_dtype, codebook_device, options)
    channel_dim = options.channel_dim % len(shape)
    layout = layout_of(shape, channel_dim, order)
    problem = Problem(
        *layout,
        size=math.prod(layout),
        channel_dim=channel_dim,
        rows=codebook_shape[0],
        stride=codebook_shape[1],
        levels=None if options.levels is None else torch.tensor(options.levels, dtype=torch.int64, device="cpu"),
        quantization_weight=options.quantization_weight,
        commitment_weight=options.commitment_weight,
        value_dtype=dtype,
        index_dtype=options.index_dtype,
        return_indices=options.return_indices,
        device=device,
    )
    forward, backward = backend.prepare(problem)
    return Call(problem, forward, backward, codebook_dtype is problem.compute_dtype, order is None, options)


# Checks, plans and launchers are made once per problem.
cached_call = lru_cache(maxsize=1024)(make_call)


def check_call(
    shape: torch.Size,
    dtype: torch.dtype,
    device: torch.device,
    codebook_shape: torch.Size,
    codebook_dtype: torch.dtype,
    codebook_device: torch.device,
    options: Options,
) -> Backend:
    """Check everything that `latent_quantize` promises to check, for known or symbolic sizes; returns the backend."""
    for name, value in (("z", dtype), ("codebook", codebook_dtype)):
        if value not in VALUE_DTYPES:
            raise TypeError(f"{name} must be float32, float64, float16 or bfloat16; got {_short(value)}")
    check_shapes(shape, codebook_shape, options.channel_dim)
    if device != codebook_device:
        raise ValueError(f"z and codebook must be on one device; got {device} and {codebook_device}")
    check_index_dtype(options.index_dtype, codebook_shape[1])
    check_levels(options.levels, codebook_shape)
    check_weight("quantization_weight", options.quantization_weight)
    check_weight("commitment_weight", options.commitment_weight)
    return select_backend(options.backend, device.type)


def check_shapes(shape: torch.Size, codebook_shape: torch.Size, channel_dim: int) -> None:
    """Raise ValueError unless the codebook [D, K] or [1, K] serves the D latents at z's `channel_dim`."""
    dims = len(shape)
    if not -dims <= channel_dim < dims:
        raise ValueError(f"channel_dim {channel_dim} is out of range for z of shape {tuple(shape)}")
    num_latents = shape[channel_dim]
    if len(codebook_shape) != 2 or codebook_shape[0] not in (1, num_latents) or codebook_shape[1] < 1:
        raise ValueError(
            f"codebook must have shape [{num_latents}, K] or [1, K] with K >= 1 for z of shape {tuple(shape)} and "
            f"channel_dim {channel_dim % dims}; got {tuple(codebook_shape)}"
        )


def check_index_dtype(index_dtype: torch.dtype, levels: int) -> None:
    """Raise TypeError for a dtype that holds no indices, ValueError for one that cannot hold `levels - 1`."""
    if index_dtype not in INDEX_DTYPES:
        raise TypeError(f"index_dtype must be uint8, int16, int32 or int64; got {_short(index_dtype)}")
    largest = torch.iinfo(index_dtype).max
    if levels - 1 > largest:
        raise ValueError(
            f"index_dtype {_short(index_dtype)} holds indices up to {largest}, too few for {levels} codes; "
            "use a wider one"
        )


def check_levels(levels: Sequence[int] | None, codebook_shape: torch.Size) -> None:
    """Raise ValueError unless every row of the codebook has a number of codes that it can hold."""
    rows, columns = codebook_shape
    if levels is not None and (len(levels) != rows or not all(1 <= count <= columns for count in levels)):
        raise ValueError(
            f"levels must be {rows} numbers of 1..{columns} for a codebook of shape {tuple(codebook_shape)}; "
            f"got {tuple(levels)}"
        )


def check_weight(name: str, weight: float) -> None:
    """Raise ValueError unless the weight of a loss is a finite number >= 0."""
    if not 0.0 <= weight < math.inf:
        raise ValueError(f"{name} must be a finite number >= 0; got {weight}")


def as_weight(name: str, weight: SupportsFloat) -> float:
    """The weight of a loss as a float; raises TypeError where it is no number."""
    if isinstance(weight, Tensor) and is_dynamo_compiling():
        raise TypeError(
            "in a compiled call the weights of the losses are numbers, not tensors; to scale the loss by a tensor, set "
            "the weights to numbers and multiply `loss` by it"
        )
    # A string has none, though float() takes it.
    if not hasattr(weight, "__float__"):
        raise TypeError(f"the weights of the losses must be numbers; got {name}={weight!r}")
    return float(weight)


def _as_levels(levels: Iterable[int]) -> tuple[int, ...]:
    try:
        return tuple(map(index, levels))
    except TypeError:
        raise TypeError(
            f"levels must be a sequence of whole numbers, one per latent, or None; got {levels!r}"
        ) from None


def _short(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
