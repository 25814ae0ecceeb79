"""What all kinds of latents have in common, and what each has of its own besides its losses."""

import numpy as np
import pytest
import torch
from torch import Tensor

from qlae.latents import (
    ContinuousLatent,
    GaussianLatent,
    Latent,
    NonnegativeLatent,
    QuantizedLatent,
    TotalCorrelationLatent,
    UniformLatent,
    VectorQuantizedLatent,
)
from qlae.methods.fsq import FiniteScalarLatent
from qlae_kernels import FusedLatentQuantizer

LATENTS: dict[str, Latent] = {
    "quantized": QuantizedLatent(FusedLatentQuantizer(4, 5)),
    "global": QuantizedLatent(FusedLatentQuantizer(4, 5, shared_codebook=True)),
    "fsq": FiniteScalarLatent(4, 5),
    "vector": VectorQuantizedLatent(4, 9, quantization_weight=1.0, commitment_weight=0.25),
    "continuous": ContinuousLatent(4),
    "nonnegative": NonnegativeLatent(4, nonnegativity_weight=1.0, activity_weight=1.0),
    "uniform": UniformLatent(4),
    "gaussian": GaussianLatent(4, weight=1.0),
    "total correlation": TotalCorrelationLatent(4, weight=1.0, beta=1.0),
}


def features_of(latent: Latent, images: int = 20) -> Tensor:
    return torch.randn(images, latent.features, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", LATENTS)
def test_shapes_and_kinds_of_numbers(kind: str) -> None:
    latent = LATENTS[kind]
    features = features_of(latent)
    values, terms = latent(features)
    codes = latent.encode(features)
    assert values.shape == latent.decode(codes).shape == (20, latent.width)
    assert codes.shape == (20, latent.num_latents)
    assert all(term.shape == () for term in terms.values())
    assert latent.discrete == (not codes.is_floating_point())
    if latent.discrete:
        assert (codes >= 0).all() and (codes < torch.tensor(latent.levels)).all()
        assert torch.equal(latent.decode(codes), values)
    assert latent.describe().startswith("4 ")


@pytest.mark.parametrize("kind", LATENTS)
def test_positions_are_codes_in_the_order_of_their_labels(kind: str) -> None:
    latent = LATENTS[kind]
    codes = latent.encode(features_of(latent))
    positions = latent.positions(codes)
    assert len(positions) == 4
    for number, each in enumerate(positions):
        assert each.dtype == codes.dtype and each.dim() == 1
        labels = latent.labels(number, each)
        assert (np.diff(labels) > 0).all()
        # where codes are decoded, they give values of the same shape as an image's own
        assert latent.decode(codes[: len(each)]).shape == (len(each), latent.width)


def test_a_scalar_latent_goes_through_its_values_wherever_they_lie() -> None:
    latent = QuantizedLatent(FusedLatentQuantizer(2, [3, 2], init_range=(0.0, 1.0)))
    with torch.no_grad():
        latent.quantizer.codebook[0] = torch.tensor([0.5, -1.0, 0.25])
    positions = latent.positions(torch.zeros(1, 2, dtype=torch.int32))
    assert [each.tolist() for each in positions] == [[1, 2, 0], [0, 1]]
    assert latent.labels(0, positions[0]).tolist() == [-1.0, 0.25, 0.5]
    assert latent.labels(1, positions[1]).tolist() == [0.0, 1.0]


def test_a_continuous_latent_goes_through_even_quantiles() -> None:
    codes = torch.arange(1001.0)[:, None] * torch.tensor([1.0, -2.0])
    first, second = ContinuousLatent(2).positions(codes[torch.randperm(1001)])
    expected = np.linspace(10.0, 990.0, 10)
    np.testing.assert_allclose(first, expected, rtol=1e-5)
    np.testing.assert_allclose(second, -2.0 * expected[::-1], rtol=1e-5)


def test_a_vector_latent_goes_through_the_codes_it_takes() -> None:
    latent = LATENTS["vector"]
    codes = torch.tensor([[8, 1, 0, 3], [2, 1, 0, 4], [8, 1, 5, 3]])
    assert [each.tolist() for each in latent.positions(codes)] == [[2, 8], [1], [0, 5], [3, 4]]


def test_a_vector_latent_takes_the_nearest_of_the_shared_codes() -> None:
    latent = VectorQuantizedLatent(2, 3, quantization_weight=1.0, commitment_weight=0.25)
    assert latent.codebook.shape == (3, 64)
    # uniform of variance 1/64
    assert latent.codebook.abs().max() <= (3.0 / 64.0) ** 0.5
    with torch.no_grad():
        latent.codebook[:] = torch.eye(3, 64)
    features = torch.zeros(1, 128)
    features[0, 2] = 0.8
    features[0, 64] = 0.7
    assert latent.encode(features).tolist() == [[2, 0]]
    values = latent.decode(torch.tensor([[2, 0]]))
    assert values.nonzero().tolist() == [[0, 2], [0, 64]]


def test_gaussian_codes_are_means_and_values_are_drawn_around_them() -> None:
    latent = GaussianLatent(2, weight=1.0)
    # softplus(0.5413) = 1
    features = torch.tensor([3.0, -2.0, 0.5413249, 0.5413249]).repeat(20_000, 1)
    torch.manual_seed(0)
    values, _ = latent(features)
    assert torch.equal(latent.encode(features), features[:, :2])
    # the mean of 20,000 draws strays by 0.007, its deviation by 0.005
    np.testing.assert_allclose(values.mean(dim=0), [3.0, -2.0], atol=0.04)
    np.testing.assert_allclose(values.std(dim=0), [1.0, 1.0], atol=0.03)


def test_total_correlation_with_beta_1_is_the_divergence_of_the_same_draws() -> None:
    """The three terms add up to log q(z | image) - log p(z), whatever the estimate of q(z)."""
    latent = TotalCorrelationLatent(3, weight=0.5, beta=1.0)
    features = torch.randn(30, 6, dtype=torch.float64)
    mean, sigma = latent.distribution(features)
    values = mean + sigma * torch.randn_like(mean)
    posterior = torch.distributions.Normal(mean, sigma).log_prob(values).sum(dim=1)
    prior = torch.distributions.Normal(0.0, 1.0).log_prob(values).sum(dim=1)
    total = sum(latent.terms(values, mean, sigma).values())
    torch.testing.assert_close(total, 0.5 * (posterior - prior).mean())


@pytest.mark.parametrize("kind", ["quantized", "global", "uniform"])
def test_samples_come_from_the_prior(kind: str) -> None:
    latent = LATENTS[kind]
    values = latent.sample(4_000, torch.Generator().manual_seed(0)).detach()
    assert values.shape == (4_000, 4)
    assert torch.equal(values, latent.sample(4_000, torch.Generator().manual_seed(0)))
    low, high = (0.0, 1.0) if kind == "uniform" else (-0.5, 0.5)
    assert values.min() >= low and values.max() <= high
    # the mean of 4,000 draws strays by about 0.006
    np.testing.assert_allclose(values.mean(dim=0), [(low + high) / 2.0] * 4, atol=0.04)
    if kind != "uniform":
        assert values.unique().tolist() == pytest.approx([-0.5, -0.25, 0.0, 0.25, 0.5])
