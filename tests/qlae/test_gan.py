"""Steps of the critic and of the generator against their losses written out in plain PyTorch, in float64."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qlae.config import TrainConfig
from qlae.methods import build_method
from qlae.methods.gan import InfoWGAN

SHAPE = (3, 8, 8)
IMAGES, LATENTS, LEVELS = 6, 5, 4
DRAW_SEED = 13
METHODS = ("qlinfowgan-gp", "infowgan-gp")
CLOSE = {"rtol": 1e-8, "atol": 1e-11}


@pytest.fixture
def images() -> Tensor:
    return torch.rand(IMAGES, *SHAPE, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def build(name: str, **changes: object) -> InfoWGAN:
    torch.manual_seed(0)
    config = TrainConfig(
        method=name, num_latents=LATENTS, learning_rate=1e-3, weight_decay=0.1, gradient_clip=1e9, latent_weight=3.0
    )
    if name == "qlinfowgan-gp":
        config = replace(config, levels=LEVELS, quantization_weight=0.7, commitment_weight=0.4)
    return build_method(replace(config, **changes), SHAPE).double()


def drawn_values(name: str, method: InfoWGAN) -> Tensor:
    if name == "infowgan-gp":
        return torch.rand(IMAGES, LATENTS, dtype=torch.float64)
    index = (torch.rand(IMAGES, LATENTS, dtype=torch.float64) * LEVELS).floor().long()
    codebook = method.latent.quantizer.codebook
    return torch.stack([codebook[latent, index[:, latent]] for latent in range(LATENTS)], dim=1)


def stated_shared(name: str, method: InfoWGAN, generated: Tensor, drawn: Tensor) -> Tensor:
    """The losses that critic and generator share, of generated images."""
    features = method.encoder(generated)
    if name == "infowgan-gp":
        return 3.0 * ((features - drawn) ** 2).mean()
    codebook = method.latent.quantizer.codebook
    index = (features[:, :, None] - codebook).abs().argmin(dim=2)
    codes = torch.stack([codebook[latent, index[:, latent]] for latent in range(LATENTS)], dim=1)
    inferred = features + (codes - features).detach()
    quantization = 0.7 * ((codes - features.detach()) ** 2).mean()
    commitment = 0.4 * ((features - codes.detach()) ** 2).mean()
    return 3.0 * ((inferred - drawn) ** 2).mean() + quantization + commitment


def value_of(method: InfoWGAN, images: Tensor) -> Tensor:
    features = method.encoder.dense(method.encoder.convolutions(images).flatten(1))
    return features @ method.critic.weight[0] + method.critic.bias


def assert_gradients(method: InfoWGAN, stated: InfoWGAN, modules: tuple[str, ...]) -> None:
    compared = 0
    for (name, parameter), expected in zip(method.named_parameters(), stated.parameters(), strict=True):
        if name.split(".")[0] in modules:
            torch.testing.assert_close(parameter.grad, expected.grad, **CLOSE, msg=name)
            compared += 1
    assert compared > 3


@pytest.mark.parametrize("name", METHODS)
def test_the_critics_loss(name: str, images: Tensor) -> None:
    method = build(name)
    stated = deepcopy(method)
    torch.manual_seed(DRAW_SEED)
    drawn = drawn_values(name, stated).detach()
    share = torch.rand(IMAGES, 1, 1, 1).double()
    generated = stated.decoder(drawn).sigmoid().detach()
    penalties = []
    for real, fake, part in zip(images, generated, share, strict=True):
        mixed = (part * real + (1.0 - part) * fake).requires_grad_()
        (slope,) = torch.autograd.grad(value_of(stated, mixed[None]).sum(), mixed, create_graph=True)
        penalties.append((slope.square().sum().sqrt() - 1.0) ** 2)
    penalty = 10.0 * torch.stack(penalties).mean()
    gap = value_of(stated, images).mean() - value_of(stated, generated).mean()
    loss = penalty - gap + stated_shared(name, stated, generated, drawn)
    loss.backward()

    torch.manual_seed(DRAW_SEED)
    result = method.critic_step(images)
    torch.testing.assert_close(result["critic_loss"], loss.detach(), **CLOSE)
    torch.testing.assert_close(result["critic_gap"], gap.detach(), **CLOSE)
    torch.testing.assert_close(result["gradient_penalty"], penalty.detach(), **CLOSE)
    assert_gradients(method, stated, ("encoder", "critic"))


@pytest.mark.parametrize("name", METHODS)
def test_the_generators_loss(name: str) -> None:
    """The codebook's gradient comes by the drawn codes too, through the images and the latent loss."""
    method = build(name)
    stated = deepcopy(method)
    torch.manual_seed(DRAW_SEED)
    drawn = drawn_values(name, stated)
    generated = stated.decoder(drawn).sigmoid()
    loss = stated_shared(name, stated, generated, drawn) - value_of(stated, generated).mean()
    loss.backward()

    torch.manual_seed(DRAW_SEED)
    result = method.generator_step(IMAGES)
    torch.testing.assert_close(result["generator_loss"], loss.detach(), **CLOSE)
    assert_gradients(method, stated, ("decoder", "latent"))


@pytest.mark.parametrize("name", METHODS)
def test_two_steps_of_each_optimizer_are_adamws(name: str, images: Tensor) -> None:
    """Written out for betas 0 and 0.9: without a first moment the step is along the gradient itself."""
    method = build(name)
    modules = {"critic": ("encoder", "critic"), "generator": ("decoder", "latent")}
    steps = {"critic": lambda: method.critic_step(images), "generator": lambda: method.generator_step(IMAGES)}
    for optimizer, take_step in steps.items():
        own = {key: value for key, value in method.named_parameters() if key.split(".")[0] in modules[optimizer]}
        squares = dict.fromkeys(own, 0.0)
        moved = 0
        for number in (1, 2):
            before = {key: value.detach().clone() for key, value in own.items()}
            take_step()
            for key, value in own.items():
                gradient = value.grad
                squares[key] = 0.9 * squares[key] + 0.1 * gradient**2
                scale = (squares[key] / (1.0 - 0.9**number)).sqrt() + 1e-8
                free = key.endswith("bias") or key.startswith("latent")
                expected = before[key] * (1.0 - (0.0 if free else 1e-3 * 0.1)) - 1e-3 * gradient / scale
                torch.testing.assert_close(value.detach(), expected, rtol=1e-9, atol=1e-12, msg=f"{key}, {number}")
                moved += not torch.equal(value.detach(), before[key])
        # all but the critic's bias, which has no gradient
        assert moved == 2 * len([key for key in own if key != "critic.bias"])


def changed(method: InfoWGAN, before: dict[str, Tensor]) -> set[str]:
    """Modules of which a parameter is not as it was."""
    return {
        name.split(".")[0] for name, value in method.named_parameters() if not torch.equal(value.detach(), before[name])
    }


def snapshot(method: InfoWGAN) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in method.named_parameters()}


@pytest.mark.parametrize("name", METHODS)
def test_each_step_teaches_its_own_modules(name: str, images: Tensor) -> None:
    method = build(name)
    before = snapshot(method)
    method.critic_step(images)
    assert changed(method, before) == {"encoder", "critic"}
    before = snapshot(method)
    method.generator_step(IMAGES)
    assert changed(method, before) == {"decoder", "latent"} - ({"latent"} if name == "infowgan-gp" else set())


@pytest.mark.parametrize(("critic_steps", "expected"), [(5, [5, 10]), (1, list(range(1, 13))), (3, [3, 6, 9, 12])])
def test_the_generator_learns_after_every_so_many_critic_steps(
    critic_steps: int, expected: list[int], images: Tensor
) -> None:
    method = build("qlinfowgan-gp", critic_steps=critic_steps)
    learned = []
    for step in range(1, 13):
        before = snapshot(method)
        values = method.training_step(images)
        assert ("generator_loss" in values) == ("decoder" in changed(method, before))
        if "generator_loss" in values:
            learned.append(step)
    assert learned == expected


def test_the_count_of_critic_steps_goes_with_the_training_state(images: Tensor) -> None:
    method, other = build("infowgan-gp"), build("infowgan-gp")
    for _ in range(3):
        method.training_step(images)
    other.load_training_state(method.training_state())
    assert ["generator_loss" in other.training_step(images) for _ in range(3)] == [False, True, False]


def test_two_optimizers_with_decay_and_clip_on_weights_alone() -> None:
    method = build("qlinfowgan-gp", gradient_clip=0.5)
    named = {id(parameter): name for name, parameter in method.named_parameters()}
    found = {}
    for optimizer, own in (("critic", ("encoder.", "critic.")), ("generator", ("decoder.", "latent."))):
        regularized, free = method.optimizers[optimizer].param_groups
        assert regularized["betas"] == free["betas"] == (0.0, 0.9)
        assert (regularized["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
        assert (regularized["gradient_clip"], free["gradient_clip"]) == (0.5, None)
        names = [{named[id(parameter)] for parameter in group["params"]} for group in (regularized, free)]
        assert set.union(*names) == {name for name in named.values() if name.startswith(own)}
        found |= dict.fromkeys(names[1], optimizer)
    free_names = {name for name in named.values() if name.endswith("bias")} | {"latent.quantizer.codebook"}
    assert set(found) == free_names
    assert found["critic.bias"] == "critic" and found["latent.quantizer.codebook"] == "generator"


def test_the_critics_gradient_is_clipped_element_by_element(images: Tensor) -> None:
    method = build("infowgan-gp", gradient_clip=1e-4)
    method.critic_step(images)
    assert method.critic.weight.grad.abs().max() == 1e-4
    assert method.encoder.head.bias.grad.abs().max() > 1e-4
