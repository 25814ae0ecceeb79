"""What the op `latent_quantize` is to return: its definition word for word, its gradients by autograd, error bounds."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

VALUE_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
INDEX_DTYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)

# The CPU kernels add at most this many values in one float before the sum moves on to double (csrc: they move after 512
# vectors, or after the unit in which these are reached, which holds 2048 vectors of two doubles at most).
LONGEST_FLOAT_SUM = 2560


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def row_of(codebook: Tensor, latent: int, levels: Sequence[int] | None) -> Tensor:
    """The codes that latent number `latent` may take."""
    row = 0 if codebook.size(0) == 1 else latent
    return codebook[row] if levels is None else codebook[row, : levels[row]]


def nearest(z: Tensor, codebook: Tensor, *, levels: Sequence[int] | None = None, channel_dim: int = 1) -> Tensor:
    """argmin over a broadcast |z - v|, latent by latent, in the compute dtype; int64 of z's shape."""
    z, codebook = (tensor.detach().to(compute_dtype(z.dtype)) for tensor in (z, codebook))
    indices = torch.zeros(z.shape, dtype=torch.int64)
    for latent, (values, out) in enumerate(
        zip(z.unbind(channel_dim), indices.unbind(channel_dim), strict=True),
    ):
        distances = (values.unsqueeze(-1) - row_of(codebook, latent, levels)).abs()
        out.copy_(distances.argmin(-1))
    return indices.where(z.isfinite(), 0)


def codes_at(indices: Tensor, codebook: Tensor, channel_dim: int = 1) -> Tensor:
    """codebook[d, index], differentiable in the codebook."""
    rows = range(indices.size(channel_dim)) if codebook.size(0) > 1 else [0] * indices.size(channel_dim)
    columns = [codebook[row][index.long()] for row, index in zip(rows, indices.unbind(channel_dim), strict=True)]
    return torch.stack(columns, channel_dim) if columns else codebook.new_empty(indices.shape)


def quantized_at(indices: Tensor, z: Tensor, codebook: Tensor, channel_dim: int = 1) -> Tensor:
    """The codes at `indices` in z's dtype, NaN where z is not finite."""
    codes = codes_at(indices, codebook.detach().to(compute_dtype(z.dtype)), channel_dim)
    return codes.masked_fill(~z.isfinite(), torch.nan).to(z.dtype)


class Gradients(NamedTuple):
    """Values in float64, and how far a correct computation in the compute dtype may be from them."""

    loss: Tensor
    grad_z: Tensor
    grad_codebook: Tensor
    loss_bound: Tensor
    grad_z_bound: Tensor
    grad_codebook_bound: Tensor


def gamma(operations: Tensor | int, dtype: torch.dtype) -> Tensor:
    """Relative error of `operations` roundings one upon the other: n u / (1 - n u), u = eps / 2 (Higham, lemma 3.1)."""
    errors = torch.as_tensor(operations, dtype=torch.float64) * torch.finfo(dtype).eps / 2
    assert (errors < 0.5).all()
    return errors / (1 - errors)


def surrogate(
    z: Tensor,
    codebook: Tensor,
    *,
    indices: Tensor | None = None,
    channel_dim: int = 1,
    levels: Sequence[int] | None = None,
    quantization_weight: float,
    commitment_weight: float,
) -> tuple[Tensor, Tensor]:
    """Straight-through values and the loss of arXiv 2305.18378, written with stop-gradients for autograd."""
    if indices is None:
        indices = nearest(z, codebook, levels=levels, channel_dim=channel_dim)
    codes = codes_at(indices, codebook, channel_dim)
    quantization = (z.detach() - codes).square().mean()
    commitment = (z - codes.detach()).square().mean()
    return z + (codes - z).detach(), quantization_weight * quantization + commitment_weight * commitment


def gradients(
    z: Tensor,
    codebook: Tensor,
    grad_quantized: Tensor | None,
    grad_loss: float,
    *,
    levels: Sequence[int] | None = None,
    channel_dim: int = 1,
    quantization_weight: float,
    commitment_weight: float,
    longest_sum: int | None = None,
) -> Gradients:
    """Loss and gradients of the surrogate in float64, for finite z, with bounds on the error of a computation.

    Every residual carries one rounding, a square or a product with a weight, the mean and a gradient a few more: 8
    covers them. A sum of n values in any order adds at most n - 1 roundings to each; n is the number of values summed,
    or `longest_sum` where the sums are known to be cut into shorter ones that are added in double. Results are rounded
    once more to their own dtype. Underflow adds up to one subnormal step per operation.
    """
    compute = compute_dtype(z.dtype)
    # Both are exact: float64 holds every value of the compute dtype.
    values = z.detach().double().requires_grad_()
    codes = codebook.detach().to(compute).double().requires_grad_()
    indices = nearest(z, codebook, levels=levels, channel_dim=channel_dim)
    quantized, loss = surrogate(
        values,
        codes,
        indices=indices,
        channel_dim=channel_dim,
        quantization_weight=quantization_weight,
        commitment_weight=commitment_weight,
    )
    objective = grad_loss * loss
    if grad_quantized is not None:
        objective = objective + (quantized * grad_quantized.double()).sum()
    grad_z, grad_codebook = torch.autograd.grad(objective, (values, codes))

    step = torch.finfo(compute).smallest_normal * torch.finfo(compute).eps
    length = z.numel()
    residual = (values - codes_at(indices, codes, channel_dim)).detach()
    scale = abs(grad_loss) * 2 / max(1, length)
    loss_bound = gamma(min(length, longest_sum or length) + 8, compute) * loss.detach().abs() + length * step
    from_loss = scale * commitment_weight * residual.abs()
    own = torch.finfo(z.dtype)
    grad_z_bound = (
        gamma(8, compute) * from_loss
        + (gamma(1, compute) + own.eps / 2) * grad_z.abs()
        + 2 * own.smallest_normal * own.eps
    )

    sums = torch.zeros_like(codes, requires_grad=False)
    counts = torch.zeros_like(codes, requires_grad=False)
    for latent, (index, size) in enumerate(
        zip(indices.unbind(channel_dim), residual.abs().unbind(channel_dim), strict=True)
    ):
        row = 0 if codebook.size(0) == 1 else latent
        sums[row].index_add_(0, index.flatten(), size.flatten())
        counts[row] += torch.bincount(index.flatten(), minlength=codebook.size(1))
    terms = counts.clamp(max=longest_sum or length)
    grad_codebook_bound = (
        gamma(terms + 8, compute) * scale * quantization_weight * sums
        + torch.finfo(codebook.dtype).eps / 2 * grad_codebook.abs()
        + 2 * torch.finfo(codebook.dtype).smallest_normal * torch.finfo(codebook.dtype).eps
        + (counts > 0) * step
    )
    return Gradients(loss.detach(), grad_z, grad_codebook, loss_bound, grad_z_bound, grad_codebook_bound)


def assert_within(got: Tensor, want: Tensor, bound: Tensor) -> None:
    """Every element of `got` lies within its own bound of `want`."""
    assert got.shape == want.shape
    error = (got.detach().double() - want).abs()
    worst = (error - bound).max() if error.numel() else torch.tensor(-1.0)
    assert (error <= bound).all(), f"off by {error.max():.3e}, {worst:.3e} beyond the bound"


def assert_same_bits(got: Tensor, want: Tensor) -> None:
    """Equal dtype, shape and bits; NaNs at the same places, whatever their payload."""
    assert got.dtype is want.dtype
    assert got.shape == want.shape
    got, want = got.detach().contiguous(), want.detach().contiguous()
    if got.dtype.is_floating_point:
        assert torch.equal(got.isnan(), want.isnan())
        integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[got.dtype.itemsize]
        got, want = (tensor.nan_to_num(0.0, torch.inf, -torch.inf).view(integers) for tensor in (got, want))
    different = (got != want).nonzero()
    assert len(different) == 0, f"{len(different)} differ, the first at {different[0].tolist()}"
