"""The reference backend against the definition word for word, and what only it offers."""

import pytest
import torch
from latent_quantize_statement import (
    VALUE_DTYPES,
    assert_same_bits,
    compute_dtype,
    nearest,
    quantized_at,
    surrogate,
)
from torch import Tensor

from qlae_kernels import latent_quantize, latent_quantize_reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")

WEIGHTS = {"quantization_weight": 0.75, "commitment_weight": 0.25}


@pytest.mark.parametrize("most", [1, 7, 30, 31, 10_000])
def test_pieces_of_any_size_give_the_same_indices(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    generator = torch.Generator().manual_seed(0)
    z, codebook = torch.randn(20, 3, 4, generator=generator), torch.randn(3, 10, generator=generator)
    monkeypatch.setattr(latent_quantize_reference, "MAX_DISTANCES", most)
    output = latent_quantize(z, codebook, backend="reference")
    assert_same_bits(output.indices, nearest(z, codebook).to(torch.int32))
    assert_same_bits(output.quantized, quantized_at(nearest(z, codebook), z, codebook))


@pytest.mark.parametrize("dtype", VALUE_DTYPES, ids=str)
def test_the_loss_is_the_mean_in_the_compute_dtype(dtype: torch.dtype) -> None:
    z = torch.tensor([[0.5, -1.0], [0.25, 3.0]], dtype=dtype)
    codebook = torch.tensor([[0.0, 1.0], [-1.0, 1.0]], dtype=compute_dtype(dtype))
    # Residuals 0.5 (the tie goes to code 0), 0, 0.25 and 2: (0.25 + 0 + 0.0625 + 4) / 4.
    output = latent_quantize(z, codebook, backend="reference", quantization_weight=1.0, commitment_weight=0.5)
    assert output.indices.tolist() == [[0, 0], [0, 1]]
    assert output.quantized.tolist() == [[0.0, -1.0], [0.0, 1.0]]
    assert output.loss.item() == 1.5 * 4.3125 / 4
    assert output.loss.dtype is compute_dtype(dtype)


def test_gradients_by_hand() -> None:
    z = torch.tensor([[0.5, -1.0], [0.25, 3.0]], requires_grad=True)
    codebook = torch.tensor([[0.0, 1.0], [-1.0, 1.0]], requires_grad=True)
    output = latent_quantize(z, codebook, backend="reference", quantization_weight=4.0, commitment_weight=2.0)
    output.loss.backward()
    # 2/M is 1/2; residuals z - q are 0.5, 0, 0.25, 2.
    assert z.grad.tolist() == [[0.5, 0.0], [0.25, 2.0]]
    assert codebook.grad.tolist() == [[-1.5, 0.0], [0.0, -4.0]]


def test_serves_the_meta_device() -> None:
    z, codebook = torch.empty(5, 3, device="meta"), torch.empty(3, 10, device="meta")
    for backend in ("reference", "auto"):
        output = latent_quantize(z, codebook, backend=backend)
        assert {tensor.device.type for tensor in output} == {"meta"}
        assert output.quantized.shape == output.indices.shape == (5, 3)
        assert output.loss.shape == ()


def test_gradients_are_those_of_autograd_through_the_surrogate() -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(30, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    codebook = torch.randn(3, 10, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.randn(30, 3, dtype=torch.float64, generator=generator)

    def gradients(quantized: Tensor, loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad((quantized * weight).sum() + loss.square(), (z, codebook))

    output = latent_quantize(z, codebook, backend="reference", **WEIGHTS)
    got = gradients(output.quantized, output.loss)
    want = gradients(*surrogate(z, codebook, **WEIGHTS))
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-15)
