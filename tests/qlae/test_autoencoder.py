"""One step of every autoencoder against its loss written out in plain PyTorch, in float64."""

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from torch.nn import functional

from qlae.config import TrainConfig
from qlae.methods import Method, build_method
from qlae.methods.base import split_parameters

SHAPE = (3, 4, 4)
# those of the paper's images, whatever the size of the images at hand
ELEMENTS = 12_288
IMAGES, LATENTS = 7, 5
NOISE_SEED = 11

OPTIONS: dict[str, dict[str, float]] = {
    "ae": {},
    "vae": {"beta": 3.0},
    "tcvae": {"beta": 4.0},
    "bioae": {"nonnegativity_weight": 0.7, "activity_weight": 0.2},
    "vqvae": {"levels": 6, "quantization_weight": 0.9, "commitment_weight": 0.3},
    "qlae": {"levels": 6, "quantization_weight": 0.3, "commitment_weight": 0.2},
    "qlae global": {"levels": 6, "quantization_weight": 0.3, "commitment_weight": 0.2, "codebook": "global"},
    "qlae fixed": {"levels": 6, "quantization_weight": 0.3, "commitment_weight": 0.2, "codebook": "fixed"},
    "fsq": {"levels": 5},
}


@pytest.fixture
def images() -> Tensor:
    return torch.rand(IMAGES, *SHAPE, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def build(case: str, **changes: float) -> Method:
    """In float64, with a clip that no gradient reaches and features large enough to meet many codes."""
    torch.manual_seed(0)
    options = {"weight_decay": 0.1, "gradient_clip": 1e9} | OPTIONS[case] | changes
    config = TrainConfig(method=case.split()[0], num_latents=LATENTS, learning_rate=1e-3, **options)
    method = build_method(config, SHAPE).double()
    with torch.no_grad():
        method.encoder.head.weight *= 4.0
    return method


def stated_values_and_terms(case: str, method: Method, features: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """What goes to the decoder, and the loss terms besides reconstruction."""
    if case == "ae":
        return features, {}
    if case == "bioae":
        negative = torch.where(features < 0, -features, torch.zeros_like(features))
        return features, {"nonnegativity": 0.7 * negative.mean(), "activity": 0.2 * (features**2).mean()}
    if case in ("vae", "tcvae"):
        mean, sigma = features[:, :LATENTS], torch.log1p(features[:, LATENTS:].exp())
        torch.manual_seed(NOISE_SEED)
        values = mean + sigma * torch.randn(IMAGES, LATENTS, dtype=torch.float64)
        return values, vae_terms(mean, sigma) if case == "vae" else tcvae_terms(values, mean, sigma)
    if case == "vqvae":
        return nearest_vectors(features, method.latent.codebook)
    if case == "fsq":
        bounded = features.tanh()
        # the publication's rounding for an odd number of values, here 5 from -2 to 2, scaled to -1 to 1
        rounded = (2.0 * bounded).round() / 2.0
        return bounded + (rounded - bounded).detach(), {}
    return nearest_scalars(features, method.latent.quantizer.codebook)


def vae_terms(mean: Tensor, sigma: Tensor) -> dict[str, Tensor]:
    divergence = kl_divergence(Normal(mean, sigma), Normal(0.0, 1.0)).sum(dim=1)
    return {"kl": 3.0 / ELEMENTS * divergence.mean()}


def tcvae_terms(values: Tensor, mean: Tensor, sigma: Tensor) -> dict[str, Tensor]:
    information, correlation, divergence = [], [], []
    for image in range(IMAGES):
        densities = Normal(mean, sigma).log_prob(values[image]).exp()
        joint = densities.prod(dim=1).mean().log()
        marginals = densities.mean(dim=0).log().sum()
        information.append(densities[image].prod().log() - joint)
        correlation.append(joint - marginals)
        divergence.append(marginals - Normal(0.0, 1.0).log_prob(values[image]).sum())
    return {
        "mutual_information": torch.stack(information).mean() / ELEMENTS,
        "total_correlation": 4.0 * torch.stack(correlation).mean() / ELEMENTS,
        "dimension_wise_kl": torch.stack(divergence).mean() / ELEMENTS,
    }


def nearest_vectors(features: Tensor, codebook: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    vectors = features.view(IMAGES * LATENTS, 64)
    codes = codebook[torch.cdist(vectors, codebook).argmin(dim=1)]
    terms = {
        "quantization": 0.9 * functional.mse_loss(codes, vectors.detach()),
        "commitment": 0.3 * functional.mse_loss(vectors, codes.detach()),
    }
    return (vectors + (codes - vectors).detach()).view(IMAGES, LATENTS * 64), terms


def nearest_scalars(features: Tensor, codebook: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    rows = codebook.expand(LATENTS, -1)
    codes = rows[torch.arange(LATENTS), (features[:, :, None] - rows).abs().argmin(dim=2)]
    quantization = 0.3 * functional.mse_loss(codes, features.detach())
    commitment = 0.2 * functional.mse_loss(features, codes.detach())
    return features + (codes - features).detach(), {"quantization": quantization + commitment}


@pytest.mark.parametrize("case", OPTIONS)
def test_a_step_follows_the_written_out_loss(case: str, images: Tensor) -> None:
    method = build(case)
    stated = deepcopy(method)
    values, terms = stated_values_and_terms(case, stated, stated.encoder(images))
    probabilities = stated.decoder(values).sigmoid()
    reconstruction = -(images * probabilities.log() + (1.0 - images) * (1.0 - probabilities).log()).mean()
    loss = reconstruction + sum(terms.values())
    loss.backward()

    torch.manual_seed(NOISE_SEED)
    result = method.training_step(images)
    # float64 sums of fewer than 1,000 values near 1
    close = {"rtol": 1e-9, "atol": 1e-12}
    assert set(result) == {"loss", "reconstruction", "psnr", *terms}
    torch.testing.assert_close(result["loss"], loss.detach(), **close)
    torch.testing.assert_close(result["reconstruction"], reconstruction.detach(), **close)
    for name, term in terms.items():
        torch.testing.assert_close(result[name], term.detach(), **close)
    for (name, parameter), expected in zip(method.named_parameters(), stated.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, **close, msg=name)
        assert expected.grad.any(), name


@pytest.mark.parametrize("case", OPTIONS)
def test_decay_and_clip_reach_all_but_biases_and_latents(case: str) -> None:
    method = build(case, gradient_clip=1e-3)
    regularized, free = method.optimizer.param_groups
    named = {id(parameter): name for name, parameter in method.named_parameters()}
    free_names = {named[id(parameter)] for parameter in free["params"]}
    codebooks = {"vqvae": {"latent.codebook"}, "qlae": {"latent.quantizer.codebook"}}
    learned = codebooks.get(case.split()[0], set()) if case != "qlae fixed" else set()
    assert free_names == {name for name in named.values() if name.endswith("bias")} | learned
    assert {named[id(parameter)] for parameter in regularized["params"]} == set(named.values()) - free_names
    assert (regularized["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    assert (regularized["gradient_clip"], free["gradient_clip"]) == (1e-3, None)
    assert regularized["betas"] == free["betas"] == (0.9, 0.999)


def test_a_fixed_codebook_stays_and_is_saved(images: Tensor) -> None:
    method = build("qlae fixed")
    before = method.latent.quantizer.codebook.clone()
    method.training_step(images)
    assert torch.equal(method.latent.quantizer.codebook, before)
    assert "latent.quantizer.codebook" in method.state_dict()
    expected = torch.linspace(-0.5, 0.5, 6, dtype=torch.float64).expand(LATENTS, -1)
    # the values were made in float32
    torch.testing.assert_close(before, expected, rtol=0.0, atol=1e-7)


def test_a_global_codebook_is_one_for_all_latents(images: Tensor) -> None:
    method = build("qlae global")
    assert method.latent.quantizer.codebook.shape == (1, 6)
    before = method.latent.quantizer.codebook.detach().clone()
    method.training_step(images)
    assert not torch.equal(method.latent.quantizer.codebook, before)


def test_parameters_are_split_by_their_names_and_owners() -> None:
    method = build("qlae")
    regularized, free = split_parameters(method.decoder, nn.Linear(2, 3))
    assert [tuple(parameter.shape) for parameter in free][-1] == (3,)
    assert [tuple(parameter.shape) for parameter in regularized][-1] == (3, 2)
