"""The op `latent_quantize`: checks, the autograd.Function, and the public functional form."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from qlae_kernels import latent_quantize_reference
from qlae_kernels.backends import select_backend
from qlae_kernels.problem import INDEX_DTYPES, VALUE_DTYPES, Backend, Problem, is_dense, layout_of

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


def latent_quantize(
    z: Tensor,
    codebook: Tensor,
    *,
    levels: Sequence[int] | None = None,
    channel_dim: int = 1,
    quantization_weight: float = 0.01,
    commitment_weight: float = 0.01,
    index_dtype: torch.dtype = torch.int32,
    return_indices: bool = True,
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
        levels: the number of codes of each latent (D values of 1..K); the rest of a row is ignored. None: K for all.
        channel_dim: the dimension of z that counts the latents.
        quantization_weight: weight of the loss whose gradient moves the codes towards z.
        commitment_weight: weight of the loss whose gradient moves z towards the codes.
        index_dtype: torch.uint8, int16, int32 or int64; must hold K - 1.
        return_indices: False leaves `indices` out (None) and saves writing them.
        backend: "auto", "cpu", "reference", "triton" or "cuda".

    A z that is NaN or infinite yields index 0, NaN in `quantized`, and a NaN or infinite loss.

    Raises:
        TypeError: z or codebook is not a tensor, or of a dtype that is not supported.
        ValueError: shapes, devices or levels do not fit, or `index_dtype` is too small.
        RuntimeError: the named backend is not available; the message says why and what to do.
    """
    arguments = (quantization_weight, commitment_weight, index_dtype, return_indices, backend)
    if levels is not None and type(levels) is not tuple:
        levels = tuple(levels)
    if torch.compiler.is_compiling() or type(z) not in _PLAIN_TENSORS or type(codebook) not in _PLAIN_TENSORS:
        from qlae_kernels.latent_quantize_ops import latent_quantize_op

        check_tensors(z, codebook)
        quantized, indices, loss = latent_quantize_op(z, codebook, levels, channel_dim, *arguments)
        return LatentQuantizerOutput(quantized, indices if return_indices else None, loss)
    key = (
        z.shape,
        z.dtype,
        z.device,
        codebook.shape,
        codebook.dtype,
        codebook.device,
        levels,
        channel_dim,
        *arguments,
    )
    if z.is_contiguous():
        call = _cached_call(*key)
    else:
        z = z if is_dense(z) else z.clone()
        call = make_call(*key, layout=layout_of(z, channel_dim % z.dim()))
    return LatentQuantizerOutput._make(LatentQuantizeFunction.apply(z, codebook, call))


class Call(NamedTuple):
    """A checked call: the backend that serves it and the problem that it solves."""

    backend: Backend
    problem: Problem

    def forward(self, z: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Quantize a dense z."""
        return self.backend.forward(z, self.compute_codebook(codebook), self.problem)

    def backward(
        self,
        z: Tensor,
        codebook: Tensor,
        grad_quantized: Tensor | None,
        grad_loss: Tensor | None,
        need_grad_z: bool,
        need_grad_codebook: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of z and of the codebook, each in its own dtype; None where not needed or without a gradient."""
        if grad_loss is None:
            # Straight-through alone: z receives the gradient of `quantized` as it is, the codebook none.
            return grad_quantized if need_grad_z else None, None
        codes = self.compute_codebook(codebook)
        if torch.is_grad_enabled():
            backend: Backend = latent_quantize_reference
        else:
            backend = self.backend
            if grad_quantized is not None and grad_quantized.stride() != z.stride():
                grad_quantized = torch.empty_like(z).copy_(grad_quantized)
        grad_z, grad_codebook = backend.backward(
            z, codes, grad_quantized, grad_loss, self.problem, need_grad_z, need_grad_codebook
        )
        if grad_codebook is not None and grad_codebook.dtype is not codebook.dtype:
            grad_codebook = grad_codebook.to(codebook.dtype)
        return grad_z, grad_codebook

    def compute_codebook(self, codebook: Tensor) -> Tensor:
        """The codebook, contiguous and in the compute dtype."""
        if codebook.dtype is not self.problem.compute_dtype:
            codebook = codebook.to(self.problem.compute_dtype)
        return codebook if codebook.is_contiguous() else codebook.contiguous()


class LatentQuantizeFunction(torch.autograd.Function):
    """The eager path: kernels called past the dispatcher. Saves z and the codebook, nothing else."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, codebook: Tensor, call: Call) -> tuple[Tensor, Tensor | None, Tensor]:
        ctx.save_for_backward(z, codebook)
        ctx.call = call
        ctx.set_materialize_grads(False)
        return call.forward(z, codebook)

    @staticmethod
    def backward(
        ctx: Any, grad_quantized: Tensor | None, _: None, grad_loss: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None]:
        z, codebook = ctx.saved_tensors
        need_grad_z, need_grad_codebook, _ = ctx.needs_input_grad
        return (
            *ctx.call.backward(z, codebook, grad_quantized, grad_loss, need_grad_z, need_grad_codebook),
            None,
        )


def check_tensors(z: Tensor, codebook: Tensor) -> None:
    """Raise TypeError unless both are tensors."""
    for name, value in (("z", z), ("codebook", codebook)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor; got {type(value).__name__}")


def make_call(
    shape: torch.Size,
    dtype: torch.dtype,
    device: torch.device,
    codebook_shape: torch.Size,
    codebook_dtype: torch.dtype,
    codebook_device: torch.device,
    levels: tuple[int, ...] | None,
    channel_dim: int,
    quantization_weight: float,
    commitment_weight: float,
    index_dtype: torch.dtype,
    return_indices: bool,
    backend: str,
    layout: tuple[int, int, int] | None = None,
) -> Call:
    """Check everything that `latent_quantize` promises to check, and choose the backend.

    `layout` is (outer, num_latents, inner) in memory order where z is not contiguous.
    """
    for name, value in (("z", dtype), ("codebook", codebook_dtype)):
        if value not in VALUE_DTYPES:
            raise TypeError(f"{name} must be float32, float64, float16 or bfloat16; got {_short(value)}")
    dims = len(shape)
    if not -dims <= channel_dim < dims:
        raise ValueError(f"channel_dim {channel_dim} is out of range for z of shape {tuple(shape)}")
    channel_dim %= dims
    num_latents = shape[channel_dim]
    if len(codebook_shape) != 2 or codebook_shape[0] not in (1, num_latents) or codebook_shape[1] < 1:
        raise ValueError(
            f"codebook must have shape [{num_latents}, K] or [1, K] with K >= 1 for z of shape {tuple(shape)} and "
            f"channel_dim {channel_dim}; got {tuple(codebook_shape)}"
        )
    if device != codebook_device:
        raise ValueError(f"z and codebook must be on one device; got {device} and {codebook_device}")
    check_index_dtype(index_dtype, codebook_shape[1])
    if layout is None:
        layout = layout_of(torch.empty(shape, device="meta"), channel_dim)
    problem = Problem(
        *layout,
        channel_dim=channel_dim,
        levels=_levels_tensor(levels, codebook_shape),
        quantization_weight=float(quantization_weight),
        commitment_weight=float(commitment_weight),
        value_dtype=dtype,
        index_dtype=index_dtype,
        return_indices=return_indices,
    )
    return Call(select_backend(backend, device.type), problem)


_cached_call = lru_cache(maxsize=1024)(make_call)


def check_index_dtype(index_dtype: torch.dtype, levels: int) -> None:
    """Raise TypeError for a dtype that holds no indices, ValueError for one that cannot hold `levels - 1`."""
    if index_dtype not in INDEX_DTYPES:
        raise TypeError(f"index_dtype must be uint8, int16, int32 or int64; got {_short(index_dtype)}")
    largest = torch.iinfo(index_dtype).max
    if levels - 1 > largest:
        raise ValueError(
            f"index_dtype {_short(index_dtype)} holds indices up to {largest}, too few for {levels} codes; use a wider one"
        )


def _levels_tensor(levels: tuple[int, ...] | None, codebook_shape: torch.Size) -> Tensor | None:
    if levels is None:
        return None
    rows, columns = codebook_shape
    if len(levels) != rows or not all(1 <= count <= columns for count in levels):
        raise ValueError(
            f"levels must be {rows} numbers of 1..{columns} for a codebook of shape {tuple(codebook_shape)}; got {levels}"
        )
    return torch.tensor(levels, dtype=torch.int64)


def _short(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
