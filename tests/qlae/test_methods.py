import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from qlae.config import TrainConfig
from qlae.errors import UserError
from qlae.method_options import OPTIONS
from qlae.methods import METHODS, Method, build_method, with_method_options
from qlae.methods.base import batch_psnr, clip_gradients, split_parameters
from qlae.metrics import psnr

CONFIG = TrainConfig(
    num_latents=6,
    levels=5,
    learning_rate=1e-3,
    weight_decay=0.1,
    quantization_weight=0.3,
    commitment_weight=0.2,
)
SHAPE = (3, 4, 4)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(16, *SHAPE, generator=torch.Generator().manual_seed(3))


def build(config: TrainConfig = CONFIG, shape: tuple[int, int, int] = SHAPE) -> Method:
    torch.manual_seed(0)
    return build_method(config, shape)


def split(method: Method) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    return split_parameters(method.encoder, method.decoder, method.latent)


def names_of(method: nn.Module, parameters: list[nn.Parameter]) -> set[str]:
    identities = {id(parameter) for parameter in parameters}
    return {name for name, parameter in method.named_parameters() if id(parameter) in identities}


def test_an_unknown_method_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match=f"'gae'.*{', '.join(METHODS)}"):
        build(replace(CONFIG, method="gae"))


@pytest.mark.parametrize("network", ["compact", "small"])
def test_all_but_biases_and_codebook_is_regularized(network: str) -> None:
    method = build(replace(CONFIG, network=network), (3, 32, 32))
    regularized, free = (names_of(method, group) for group in split(method))
    everything = {name for name, _ in method.named_parameters()}
    assert free == {name for name in everything if name.endswith("bias")} | {"latent.quantizer.codebook"}
    assert regularized == everything - free
    if network == "small":
        # an instance norm's weight and the decoder's constant
        assert {"encoder.convolutions.1.weight", "decoder.constant"} <= regularized
        assert "encoder.convolutions.1.bias" in free


def test_decay_and_clip_reach_the_regularized_parameters_alone() -> None:
    """With gradients far above the bound AdamW's first step is -lr for all, and decay is lr * wd * p on top."""
    config = replace(CONFIG, learning_rate=0.01, weight_decay=0.5, gradient_clip=1e-3)
    method = build(config)
    before = {name: parameter.detach().clone() for name, parameter in method.named_parameters()}
    regularized, _ = (names_of(method, group) for group in split(method))
    for parameter in method.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    clip_gradients(method.optimizer)
    for name, parameter in method.named_parameters():
        clipped = 1e-3 if name in regularized else 7.0
        assert torch.equal(parameter.grad, torch.full_like(parameter, clipped)), name
    method.optimizer.step()
    for name, parameter in method.named_parameters():
        decay = 0.01 * 0.5 if name in regularized else 0.0
        expected = before[name] * (1.0 - decay) - 0.01
        # a first step is lr * g / (|g| + 1e-8), so within 1e-5 of lr; then float32 rounding of values below 2
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-6, atol=1e-6, msg=name)


def test_first_step_equals_the_written_out_objective(images: torch.Tensor) -> None:
    method, plain = build(), build()
    result = method.training_step(images)

    z = plain.encoder(images)
    codebook = plain.latent.quantizer.codebook
    index = (z[:, :, None] - codebook).abs().argmin(dim=2)
    codes = torch.take_along_dim(codebook.expand(len(z), -1, -1), index[:, :, None], dim=2)[:, :, 0]
    logits = plain.decoder(codes.detach() + (z - z.detach()))
    reconstruction = -(images * logits.sigmoid().log() + (1.0 - images) * (1.0 - logits.sigmoid()).log()).mean()
    quantization = 0.3 * (codes - z.detach()).square().mean() + 0.2 * (z - codes.detach()).square().mean()
    (reconstruction + quantization).backward()
    torch.testing.assert_close(result["reconstruction"], reconstruction.detach())
    torch.testing.assert_close(result["quantization"], quantization.detach())
    torch.testing.assert_close(result["loss"], (reconstruction + quantization).detach())

    regularized, free = split(plain)
    nn.utils.clip_grad_value_(regularized, 1.0)
    torch.optim.AdamW(
        [{"params": regularized, "weight_decay": 0.1}, {"params": free, "weight_decay": 0.0}],
        lr=1e-3,
        betas=(0.9, 0.999),
    ).step()
    for (name, updated), expected in zip(method.named_parameters(), plain.parameters(), strict=True):
        # Adam's first step has the size of the learning rate whatever the gradient; near a zero gradient its
        # rounding decides, so almost all elements must agree far below that size, and each within two steps
        difference = (updated - expected).abs().detach()
        assert (difference < 1e-5).double().mean() > 0.98, name
        assert difference.max() <= 2.1e-3, name


def test_the_codebook_learns(images: torch.Tensor) -> None:
    method = build()
    before = method.latent.quantizer.codebook.detach().clone()
    method.training_step(images)
    assert not torch.equal(method.latent.quantizer.codebook, before)


def test_the_loss_falls(images: torch.Tensor) -> None:
    method = build()
    losses = [method.training_step(images)["loss"].item() for _ in range(60)]
    assert losses[-1] < losses[0]


def test_step_values_are_detached_scalars(images: torch.Tensor) -> None:
    values = build().training_step(images)
    assert {"loss", "psnr"} <= set(values)
    assert all(value.shape == () and not value.requires_grad for value in values.values())


def test_encoding_and_decoding_agree_with_the_training_path(images: torch.Tensor) -> None:
    method = build()
    codes, reconstructions = method.encode_and_reconstruct(images)
    assert codes.shape == (16, 6) and not codes.is_floating_point()
    with torch.no_grad():
        quantized, expected_indices, _ = method.latent.quantizer(method.encoder(images))
        expected = method.decoder(quantized).sigmoid()
    assert torch.equal(codes, expected_indices)
    assert torch.equal(reconstructions, expected)
    assert torch.equal(method.decode(codes), expected)
    assert torch.equal(method.reconstruct(images), expected)
    assert reconstructions.min() >= 0.0 and reconstructions.max() <= 1.0


def test_batch_psnr_is_the_metric(images: torch.Tensor) -> None:
    logits = torch.randn(16, *SHAPE, generator=torch.Generator().manual_seed(4))
    # float32 against float64: the mean of 48 squares loses at most a few ulps, a millionth of a decibel each
    assert batch_psnr(images, logits).item() == pytest.approx(psnr(images, logits.sigmoid()), abs=1e-4)


@pytest.mark.parametrize(("name", "optimizers"), [("qlae", 1), ("qlinfowgan-gp", 2), ("infowgan-gp", 2)])
def test_learning_rate_factor_scales_every_group_of_every_optimizer(name: str, optimizers: int) -> None:
    method = build(TrainConfig(method=name, num_latents=6, learning_rate=1e-3))
    assert len(method.optimizers) == optimizers
    for factor in (0.5, 0.25):
        method.set_learning_rate_factor(factor)
        rates = [group["lr"] for optimizer in method.optimizers.values() for group in optimizer.param_groups]
        assert rates == [factor * 1e-3] * 2 * optimizers


def test_binary_cross_entropy_is_the_mean_over_all_elements(images: torch.Tensor) -> None:
    method = build()
    with torch.no_grad():
        logits = method.decoder(method.latent.quantizer(method.encoder(images)).quantized)
        per_image = functional.binary_cross_entropy_with_logits(logits, images, reduction="none")
    expected = per_image.flatten(1).mean(dim=1).mean()
    torch.testing.assert_close(method.training_step(images)["reconstruction"], expected)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_and_codes_images(method: str, images: torch.Tensor) -> None:
    torch.manual_seed(0)
    # decay alone would move every weight
    built = build_method(TrainConfig(method=method, num_latents=6, weight_decay=0.0), SHAPE)
    before = {name: value.detach().clone() for name, value in built.named_parameters()}
    for _ in range(6):
        values = built.training_step(images)
        assert all(value.shape == () and not value.requires_grad and value.isfinite() for value in values.values())
    # six steps have one of a GAN's generator; its critic's bias has no gradient, since it cancels in the gap
    for name, value in built.named_parameters():
        assert torch.equal(value, before[name]) == (name == "critic.bias"), name
    codes, reconstructions = built.encode_and_reconstruct(images)
    assert codes.shape == (16, 6) and reconstructions.shape == images.shape
    assert codes.is_floating_point() != built.latent.discrete
    assert torch.equal(codes, built.encode(images))


def test_every_method_has_its_options_in_the_same_order() -> None:
    assert list(METHODS) == list(OPTIONS)


def test_an_option_is_left_to_the_methods_that_have_it() -> None:
    """Of the configuration's fields those are a method's own that may be None and that no data set decides."""
    left_open = {field.name for field in fields(TrainConfig) if field.default is None}
    own = {name for options in OPTIONS.values() for name in options}
    assert own == left_open - {"root", "resolution", "num_latents"}


def test_an_option_without_a_value_has_the_methods_own() -> None:
    config = with_method_options(TrainConfig(method="vqvae", commitment_weight=0.5))
    assert (config.levels, config.quantization_weight, config.commitment_weight) == (512, 1.0, 0.5)
    assert (config.beta, config.codebook, config.critic_steps) == (None, None, None)
    assert with_method_options(config) == config


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("ae", {"beta": 2.0}, "--beta 2.0: the method ae has no such option, leave it out; .* vae, tcvae"),
        ("vae", {"levels": 4}, "--levels 4: .*qlae, qlinfowgan-gp, vqvae, fsq"),
        ("qlae", {"critic_steps": 3}, "--critic-steps 3: .*qlinfowgan-gp, infowgan-gp"),
        ("fsq", {"codebook": "fixed"}, "--codebook fixed: "),
    ],
)
def test_an_option_of_another_method_is_refused(method: str, changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(TrainConfig(method=method, num_latents=6, **changes))


def test_the_documents_table_has_every_method_with_its_options() -> None:
    text = (Path(__file__).parents[2] / "docs" / "methods.md").read_text(encoding="utf-8")
    table = text[text.index("| METHOD | latents |") : text.index("Quantization is a weight")]
    found = {}
    for line in table.splitlines()[2:]:
        cells = re.split(r"(?<!\\)\|", line)
        if len(cells) > 4:
            options = re.findall(r"`--(\S+) (\S+)`", cells[4])
            found[cells[1].strip(" `")] = {name.replace("-", "_"): value for name, value in options}
    expected = {name: {option: str(value) for option, value in options.items()} for name, options in OPTIONS.items()}
    assert found == expected
