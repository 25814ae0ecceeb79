"""Finite scalar quantization: its grid, its gradient, and a few steps of training."""

import pytest
import torch

from qlae.config import TrainConfig
from qlae.methods import build_method
from qlae.methods.fsq import FiniteScalarLatent


def test_the_grid_is_even_and_fixed() -> None:
    latent = FiniteScalarLatent(2, 5)
    assert latent.quantizer.codebook.tolist() == [[-1.0, -0.5, 0.0, 0.5, 1.0]] * 2
    assert list(latent.parameters()) == []
    assert "quantizer.codebook" in latent.state_dict()


@pytest.mark.parametrize("levels", [2, 5, 8])
def test_values_are_the_nearest_of_the_grid_to_the_tanh(levels: int) -> None:
    features = torch.linspace(-3.0, 3.0, 402).view(201, 2)
    latent = FiniteScalarLatent(2, levels)
    values, terms = latent(features)
    # on the grid of step 2 / (levels - 1) from -1
    expected = ((features.tanh() + 1.0) * (levels - 1) / 2.0).round()
    assert terms == {}
    torch.testing.assert_close(values, 2.0 * expected / (levels - 1) - 1.0)
    codes = latent.encode(features)
    assert torch.equal(codes, expected.int())
    assert torch.equal(latent.decode(codes), values)


def test_the_gradient_passes_the_rounding_and_the_tanh() -> None:
    features = torch.randn(40, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    weights = torch.randn(40, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    values, _ = FiniteScalarLatent(3, 7).double()(features)
    (weights * values).sum().backward()
    expected = weights * (1.0 - features.detach().tanh() ** 2)
    torch.testing.assert_close(features.grad, expected, rtol=1e-12, atol=1e-14)


def test_a_few_steps_lower_the_loss() -> None:
    torch.manual_seed(0)
    method = build_method(TrainConfig(method="fsq", num_latents=6), (3, 4, 4))
    images = torch.rand(16, 3, 4, 4, generator=torch.Generator().manual_seed(3))
    losses = [method.training_step(images)["loss"].item() for _ in range(40)]
    assert losses[-1] < losses[0] - 0.01
