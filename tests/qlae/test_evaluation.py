import json
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qlae.data import Dataset, Factor
from qlae.data.base import factors_of_index
from qlae.evaluation import draw, draw_codes, evaluate, traverse
from qlae.latents import ContinuousLatent, Latent, QuantizedLatent, UniformLatent
from qlae.methods.base import Method
from qlae_kernels import FusedLatentQuantizer

# The third channel is 0.5 in the images and 0.6 in the reconstructions.
TOY_PSNR = -10 * math.log10(0.1**2 / 3)


class Toy(Dataset):
    """Images of 2 x 2 pixels, whose red and green are the two factors' positions from 0 to 1."""

    name = "toy"
    summary = "two factors as two colours"
    image_shape = (3, 2, 2)
    device = torch.device("cpu")

    def __init__(self, with_factors: bool = True) -> None:
        self.factors = (Factor("red", 3), Factor("green", 4)) if with_factors else ()

    def __len__(self) -> int:
        return 12

    def images(self, index: Tensor) -> Tensor:
        red, green = factors_of_index(index, (Factor("red", 3), Factor("green", 4))).T
        colours = torch.stack([red / 2, green / 3, torch.full_like(red, 0.5, dtype=torch.float32)], dim=1)
        return colours[:, :, None, None].expand(-1, *self.image_shape).contiguous()

    def sources(self, index: Tensor) -> Tensor:
        return factors_of_index(index, self.factors) if self.factors else index.new_empty(len(index), 0)

    def describe(self) -> str:
        return "toy"


class Colours(nn.Module):
    """The latents red and green, and one that is always 0.5."""

    def forward(self, images: Tensor) -> Tensor:
        return images.mean(dim=(2, 3))


class Paint(nn.Module):
    """Exact but for the third channel, which is 0.1 too bright."""

    def __init__(self) -> None:
        super().__init__()
        self.excess = nn.Parameter(torch.tensor([0.0, 0.0, 0.1]))

    def forward(self, latents: Tensor) -> Tensor:
        colours = latents + self.excess
        return colours.logit()[:, :, None, None].expand(-1, -1, 2, 2)


def quantized(levels: tuple[int, ...]) -> QuantizedLatent:
    return QuantizedLatent(FusedLatentQuantizer(3, levels, init_range=(0.0, 1.0), backend="reference"))


class ToyMethod(Method):
    def __init__(self, latent: Latent | None = None) -> None:
        super().__init__()
        self.encoder = Colours()
        self.decoder = Paint()
        self.latent = latent or quantized((3, 4, 5))
        self.optimizers = {}

    @classmethod
    def from_config(cls, config, image_shape):
        raise NotImplementedError

    def training_step(self, images: Tensor) -> dict[str, Tensor]:
        raise NotImplementedError


ALL = torch.arange(12)


def test_scores_by_hand() -> None:
    evaluation = evaluate(ToyMethod(), Toy(), ALL)
    scores = evaluation.infomec
    np.testing.assert_allclose(scores.nmi, [[1, 0, 0], [0, 1, 0]], atol=1e-12)
    assert (scores.infom, scores.infoc) == (pytest.approx(1.0), pytest.approx(1.0))
    assert evaluation.psnr == pytest.approx(TOY_PSNR, abs=1e-4)
    assert [counts.tolist() for counts in evaluation.usage] == [[4] * 3, [3] * 4, [0, 0, 12, 0, 0]]
    assert evaluation.perplexity.tolist() == pytest.approx([3.0, 4.0, 1.0])
    assert evaluation.active.tolist() == [True, True, False]


def test_reports() -> None:
    evaluation = evaluate(ToyMethod(), Toy(), ALL)
    row = evaluation.row()
    assert list(row) == ["infom", "infoc", "infoe", "psnr", "active", "mean_perplexity"]
    assert row["active"] == 2
    assert row["mean_perplexity"] == pytest.approx(8 / 3)
    summary = json.loads(json.dumps(evaluation.summary(), allow_nan=False))
    assert summary["infom"] == pytest.approx(1.0)
    assert summary["infoe_converged"] is True
    assert summary["perplexity"] == pytest.approx([3.0, 4.0, 1.0])
    assert (summary["active"], summary["num_latents"], summary["evaluation_images"]) == (2, 3, 12)
    assert evaluation.line() == "InfoM 1.000, InfoC 1.000, InfoE 1.000, PSNR 24.8 dB, 2 of 3 latents active"


def test_data_without_factors() -> None:
    evaluation = evaluate(ToyMethod(), Toy(with_factors=False), ALL[:1])
    assert evaluation.infomec is None
    assert list(evaluation.row()) == ["psnr", "active", "mean_perplexity"]
    assert evaluation.summary()["infom"] is None
    assert evaluation.line() == "PSNR 24.8 dB, 0 of 3 latents active"


@pytest.mark.parametrize("batch_size", [1, 5, 12])
def test_batches_do_not_matter(batch_size: int) -> None:
    expected = evaluate(ToyMethod(), Toy(), ALL).summary()
    summary = evaluate(ToyMethod(), Toy(), ALL, batch_size=batch_size).summary()
    assert summary.pop("psnr") == pytest.approx(expected.pop("psnr"))
    assert summary == expected


def test_examples_are_spread_over_the_images() -> None:
    dataset = Toy()
    index = torch.arange(12).repeat_interleave(100)
    evaluation = evaluate(ToyMethod(), dataset, index)
    assert evaluation.inputs.shape == (16, 3, 2, 2)
    sources = dataset.sources(index[torch.linspace(0, 1199, 16).round().long()])
    # The first two latents' indices are the factors' positions.
    assert evaluation.codes[:, :2].tolist() == sources.tolist()
    expected = evaluation.inputs + torch.tensor([0.0, 0.0, 0.1])[:, None, None]
    torch.testing.assert_close(evaluation.reconstructions, expected)


def test_the_model_and_the_random_state_stay_as_they_were() -> None:
    method = ToyMethod().train()
    state = torch.get_rng_state()
    evaluation = evaluate(method, Toy(), ALL)
    traverse(method, evaluation.codes[0], evaluation.positions)
    draw(ToyMethod(UniformLatent(3)), 2)
    assert method.training and method.encoder.training
    assert torch.equal(torch.get_rng_state(), state)
    assert not evaluation.reconstructions.requires_grad
    assert not evaluate(method.eval(), Toy(), ALL).inputs.requires_grad
    assert not method.training


def test_an_empty_index_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one image"):
        evaluate(ToyMethod(), Toy(), ALL[:0])


def test_strips_follow_the_values_not_the_indices() -> None:
    method = ToyMethod()
    with torch.no_grad():
        method.latent.quantizer.codebook[1, :4] = torch.tensor([0.9, 0.1, 0.7, 0.3])
    base = torch.tensor([2, 0, 2], dtype=torch.int32)
    strips = traverse(method, base, method.latent.positions(base[None]))
    assert [len(strip.images) for strip in strips] == [3, 4, 5]
    strip = strips[1]
    assert strip.values.tolist() == pytest.approx([0.1, 0.3, 0.7, 0.9])
    assert strip.codes.tolist() == [1, 3, 2, 0]
    assert strip.base == 3
    # Green follows the strip; red and blue stay as they are in the base image.
    assert strip.images[:, 1, 0, 0].tolist() == pytest.approx([0.1, 0.3, 0.7, 0.9], abs=1e-6)
    assert strip.images[:, 0].unique().tolist() == [1.0]
    assert strip.images[:, 2].unique().tolist() == pytest.approx([0.6])
    assert [strip.base for strip in strips] == [2, 3, 2]


@pytest.mark.parametrize("base", [0, 1, 50, 98, 99])
def test_long_strips_are_thinned_and_keep_the_base(base: int) -> None:
    method, codes = ToyMethod(quantized((100, 4, 5))), torch.tensor([base, 0, 0])
    strips = traverse(method, codes, method.latent.positions(codes[None]), max_codes=16)
    strip = strips[0]
    assert len(strip.images) == 16
    assert strip.codes[strip.base] == base
    assert (np.diff(strip.values) > 0).all()
    # Even steps are 99 / 15 codes, and the base moves one of them by at most half a step.
    assert np.diff(strip.codes).max() <= math.ceil(1.5 * 99 / 15)


def test_continuous_latents_are_scored_by_their_values() -> None:
    evaluation = evaluate(ToyMethod(ContinuousLatent(3)), Toy(), ALL.repeat(50))
    assert (evaluation.usage, evaluation.perplexity) == (None, None)
    assert list(evaluation.row()) == ["infom", "infoc", "infoe", "psnr", "active"]
    assert evaluation.summary()["perplexity"] is None
    assert evaluation.summary()["evaluation_images"] == 600
    # red and green run from 0 to 1, and the third latent is always 0.5
    assert evaluation.active.tolist() == [True, True, False]
    assert evaluation.infomec.active.tolist() == [True, True, False]
    assert evaluation.infomec.infom == pytest.approx(1.0, abs=0.05)
    assert evaluation.psnr == pytest.approx(TOY_PSNR, abs=1e-4)


def test_continuous_latents_without_factors() -> None:
    evaluation = evaluate(ToyMethod(ContinuousLatent(3)), Toy(with_factors=False), ALL)
    assert evaluation.active.tolist() == [True, True, False]


def test_continuous_strips_go_through_quantiles_and_the_base_value() -> None:
    method = ToyMethod(ContinuousLatent(3))
    positions = [torch.linspace(0.1, 0.9, 9)] * 3
    strips = traverse(method, torch.tensor([0.42, 0.5, 0.97]), positions)
    assert strips[0].values.tolist() == pytest.approx([0.1, 0.2, 0.3, 0.42, 0.5, 0.6, 0.7, 0.8, 0.9])
    assert [strip.base for strip in strips] == [3, 4, 8]
    assert strips[2].values[-1] == pytest.approx(0.97)
    assert strips[0].images[:, 0, 0, 0].tolist() == pytest.approx(strips[0].values.tolist(), abs=1e-6)
    assert strips[0].images[:, 1].unique().tolist() == [0.5]
    # what the evaluation gave stays as it was
    assert torch.equal(positions[0], torch.linspace(0.1, 0.9, 9))


def test_a_uniform_prior_is_traversed_evenly_wherever_the_codes_lie() -> None:
    positions = UniformLatent(3).positions(torch.randn(50, 3) + 7.0)
    assert len(positions) == 3
    for latent in positions:
        assert latent.tolist() == pytest.approx([step / 9 for step in range(10)])


def test_drawn_codes_are_those_of_the_drawn_images() -> None:
    method = ToyMethod(quantized((3, 2, 1)))
    with torch.no_grad():
        method.latent.quantizer.codebook[0, :3] = torch.tensor([0.9, 0.1, 0.5])
    codes = draw_codes(method, 50, seed=3)
    assert codes.shape == (50, 3) and not codes.is_floating_point()
    torch.testing.assert_close(method.decode(codes), draw(method, 50, seed=3))


def test_drawn_images_are_those_of_the_prior() -> None:
    images = draw(ToyMethod(quantized((3, 2, 1))), 200)
    assert images.shape == (200, 3, 2, 2)
    assert [len(images[:, channel].unique()) for channel in range(3)] == [3, 2, 1]
    assert torch.equal(images, draw(ToyMethod(quantized((3, 2, 1))), 200))
