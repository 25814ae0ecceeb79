"""Positions that do not count: the same as if they were not there."""

import pytest
import torch
from backend_variants import each_backend
from latent_quantize_statement import assert_same_bits
from on_device import device_of, on_backend, to_device
from torch import Tensor

from qlae_kernels import FusedLatentQuantizer, LatentQuantizerOutput, latent_quantize

WEIGHTS = {"quantization_weight": 0.75, "commitment_weight": 0.25}
LEVELS = [7, 2, 5]


def problem(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """z [4, 3, 5, 2], codebook [3, 7] whose first codes are no half numbers, and a mask [4, 5, 2] of 40 positions."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(4, 3, 5, 2, generator=generator).to(dtype)
    compute = torch.float64 if dtype is torch.float64 else torch.float32
    codebook = torch.randn(3, 7, generator=generator, dtype=compute)
    mask = torch.rand(4, 5, 2, generator=generator) < 0.6
    assert 0 < mask.sum() < 40
    return z, codebook, mask


def counted(tensor: Tensor, mask: Tensor) -> Tensor:
    """[n, 3]: the positions of [4, 3, 5, 2] that count."""
    return tensor.movedim(1, -1)[mask]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_the_others_are_quantized_as_if_alone(backend: str, dtype: torch.dtype) -> None:
    z, codebook, mask = problem(dtype)
    weight = torch.randn(z.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    z.movedim(1, -1)[~mask] = torch.nan
    leaves = [on_backend(tensor.clone().requires_grad_(), backend) for tensor in (z, codebook)]
    device = device_of(backend)
    options = {**WEIGHTS, "levels": LEVELS, "backend": backend}
    got = latent_quantize(*leaves, mask=mask.to(device), **options)
    gradients = torch.autograd.grad((got.quantized * weight.to(device)).sum() + got.loss, leaves)

    rows = counted(z, mask).contiguous()
    alone = [tensor.clone().requires_grad_() for tensor in (rows, codebook)]
    want = latent_quantize(*alone, **options | {"backend": "reference"})
    objective = (want.quantized * counted(weight, mask)).sum() + want.loss
    want_z, want_codebook = torch.autograd.grad(objective, alone)

    quantized, indices, loss = (to_device(each.detach(), torch.device("cpu")) for each in got)
    assert quantized.dtype is dtype and loss.dtype is codebook.dtype
    assert_same_bits(counted(quantized, mask), want.quantized.detach())
    assert_same_bits(counted(indices, mask), want.indices)
    torch.testing.assert_close(loss, want.loss.detach())
    grad_z, grad_codebook = (to_device(each, torch.device("cpu")) for each in gradients)
    torch.testing.assert_close(counted(grad_z, mask), want_z)
    torch.testing.assert_close(grad_codebook, want_codebook)
    for left_out in (quantized, indices, grad_z):
        assert not left_out.movedim(1, -1)[~mask].any()


@each_backend
@pytest.mark.parametrize("shared", [False, True], ids=["codebooks", "shared"])
def test_channels_may_be_last(backend: str, shared: bool) -> None:
    device = device_of(backend)
    quantizer = FusedLatentQuantizer(3, 6, channel_dim=-1, shared_codebook=shared, backend=backend, device=device)
    z = torch.randn(4, 9, 3, device=device)
    mask = torch.rand(4, 9, device=device) < 0.5
    quantized, indices, loss = quantizer(z, mask)
    want = quantizer(z[mask].unsqueeze(0))
    assert_same_bits(quantized[mask], want.quantized[0])
    assert_same_bits(indices[mask], want.indices[0])
    torch.testing.assert_close(loss, want.loss)


def test_where_all_count_nothing_changes(backend: str) -> None:
    z, codebook, mask = (on_backend(tensor, backend) for tensor in problem())
    got = latent_quantize(z, codebook, mask=torch.ones_like(mask), backend=backend)
    for one, other in zip(got, latent_quantize(z, codebook, backend=backend), strict=True):
        assert_same_bits(one, other)


@pytest.mark.parametrize("batch", [4, 0])
def test_where_none_counts_there_is_no_loss_and_no_gradient(backend: str, batch: int) -> None:
    z, codebook, mask = (on_backend(tensor, backend) for tensor in problem())
    z, mask = z[:batch].clone().fill_(torch.inf).requires_grad_(), torch.zeros_like(mask[:batch])
    codebook.requires_grad_()
    quantized, _, loss = latent_quantize(z, codebook, mask=mask, backend=backend)
    assert loss.item() == 0.0
    grad_z, grad_codebook = torch.autograd.grad(quantized.sum() + loss, (z, codebook))
    assert not grad_z.any() and not grad_codebook.any() and not quantized.any()


@each_backend
def test_a_compiled_call_with_a_mask(backend: str) -> None:
    z, codebook, mask = (on_backend(tensor, backend) for tensor in problem())
    torch.compiler.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def quantize(z: Tensor, codebook: Tensor, mask: Tensor) -> LatentQuantizerOutput:
        return latent_quantize(z, codebook, mask=mask, backend=backend)

    want = latent_quantize(z, codebook, mask=mask, backend=backend)
    for one, other in zip(quantize(z, codebook, mask), want, strict=True):
        assert_same_bits(one, other)


@each_backend
def test_without_indices(backend: str) -> None:
    z, codebook, mask = (on_backend(tensor, backend) for tensor in problem())
    assert latent_quantize(z, codebook, mask=mask, return_indices=False, backend=backend).indices is None


@pytest.mark.parametrize(
    ("mask", "error", "named"),
    [
        (torch.ones(4, 5, 2), TypeError, "torch.float32"),
        ([True], TypeError, "list"),
        (torch.ones(4, 3, 5, 2, dtype=torch.bool), ValueError, "(4, 5, 2)"),
        (torch.ones(5, 2, dtype=torch.bool), ValueError, "(5, 2)"),
        (torch.ones(4, 5, 2, dtype=torch.bool, device="meta"), ValueError, "meta"),
    ],
    ids=["float", "list", "of z's shape", "broadcast", "device"],
)
def test_a_mask_that_does_not_fit_is_refused(mask: object, error: type[Exception], named: str) -> None:
    z, codebook, _ = problem()
    with pytest.raises(error) as raised:
        latent_quantize(z, codebook, mask=mask)
    assert named in str(raised.value) and "mask" in str(raised.value)
