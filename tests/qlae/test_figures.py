from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from qlae import figures
from qlae.config import TrainConfig
from qlae.data import Dataset, load_dataset
from qlae.data.rooms3d import Rooms3D
from qlae.evaluation import TraversalStrip, evaluate
from qlae.figures import plot_factors
from qlae.methods import build_method
from qlae.metrics import InfoMEC, code_counts, infomec, perplexity
from qlae.run_folder import RunFolder

FACTORS = ["floor_hue", "wall_hue", "object_hue", "scale", "shape", "orientation"]


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures written during a test."""
    written: list[Figure] = []
    save = figures._save

    def save_and_keep(figure: Figure, path: Path) -> None:
        save(figure, path)
        written.append(figure)

    monkeypatch.setattr(figures, "_save", save_and_keep)
    return written


def check(figure: Figure, path: Path) -> None:
    """The file has the figure's size, and nothing is cut off at its edge."""
    width, height = figure.get_size_inches() * figures.DOTS_PER_INCH
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.size == pytest.approx((width, height), abs=1)
        pixels = np.asarray(image.convert("RGB"))
    for edge in (pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -2:]):
        assert (edge == 255).all()
    assert (pixels != 255).any()


def has_colour(path: Path, colour: str) -> bool:
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    return bool((pixels == np.round(np.array(to_rgb(colour)) * 255)).all(axis=1).any())


def random_codes(num_latents: int, levels: int = 10, samples: int = 300) -> np.ndarray:
    return np.random.default_rng(0).integers(0, levels, (samples, num_latents))


def random_scores(num_latents: int) -> InfoMEC:
    """Scores against six sources, the last one constant; every third latent is inactive."""
    latents, sources = random_codes(num_latents, 4), random_codes(6, 3)
    latents[:, 2::3] = 1
    sources[:, 5] = 0
    return infomec(latents, sources)


def random_strips(lengths: list[int], height: int = 16, width: int = 16) -> list[TraversalStrip]:
    generator = torch.Generator().manual_seed(0)
    return [
        TraversalStrip(
            images=torch.rand(length, 3, height, width, generator=generator),
            codes=np.arange(length)[::-1],
            values=np.linspace(-0.5, 0.5, length),
            base=length // 2,
        )
        for length in lengths
    ]


@pytest.mark.parametrize("num_latents", [1, 12, 64])
def test_nmi(num_latents: int, tmp_path: Path, saved: list[Figure]) -> None:
    scores = random_scores(num_latents)
    figures.plot_nmi(scores, FACTORS, tmp_path / "nmi.png")
    check(saved[0], tmp_path / "nmi.png")
    axes = saved[0].axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == FACTORS
    assert len(axes.get_xticklabels()) == num_latents
    assert f"InfoM {scores.infom:.2f}" in axes.get_title()
    # One hatched box for each inactive latent, and one for the constant source.
    assert len(axes.patches) == np.count_nonzero(~scores.active) + 1


@pytest.mark.parametrize("num_latents", [1, 12, 64])
def test_code_usage(num_latents: int, tmp_path: Path, saved: list[Figure]) -> None:
    codes = random_codes(num_latents)
    figures.plot_code_usage(code_counts(codes, 11), perplexity(codes, 11), tmp_path / "usage.png")
    check(saved[0], tmp_path / "usage.png")
    assert f"{num_latents} of {11 * num_latents} codes never taken" in saved[0].get_suptitle()
    titles = [axes.get_title() for axes in saved[0].axes if axes.get_title()]
    assert len(titles) == num_latents
    assert titles[0].startswith("latent 0: perplexity 9.")
    assert has_colour(tmp_path / "usage.png", figures.VERMILLION)


def test_code_usage_with_levels_per_latent(tmp_path: Path, saved: list[Figure]) -> None:
    levels = [1, 2, 300]
    codes = random_codes(3, 1000) % levels
    figures.plot_code_usage(code_counts(codes, levels), perplexity(codes, levels), tmp_path / "usage.png")
    check(saved[0], tmp_path / "usage.png")


@pytest.mark.parametrize(
    "lengths", [[10], [1], [2, 2], [3, 10, 7], [4] * 64], ids=lambda lengths: f"{len(lengths)}x{max(lengths)}"
)
@pytest.mark.parametrize("told", [True, False])
def test_traversals(lengths: list[int], told: bool, tmp_path: Path, saved: list[Figure]) -> None:
    active = np.arange(len(lengths)) % 2 == 0
    texts = ["orientation, NMI 0.93"] * len(lengths) if told else None
    figures.plot_traversals(random_strips(lengths), active, tmp_path / "traversals.png", told=texts)
    check(saved[0], tmp_path / "traversals.png")
    axes = saved[0].axes[0]
    assert len(axes.images) == sum(lengths)
    written = [text.get_text() for text in axes.texts]
    assert written.count("inactive") == np.count_nonzero(~active)
    assert written.count("orientation, NMI 0.93") == told * np.count_nonzero(active)
    assert {f"latent {latent}" for latent in range(len(lengths))} <= set(written)
    # One frame for each latent, and one in the explanation.
    assert len(axes.patches) == len(lengths) + 1


def test_traversals_frame_the_base_code_and_fade_inactive_latents(tmp_path: Path, saved: list[Figure]) -> None:
    strips = random_strips([4, 4])
    figures.plot_traversals(strips, np.array([True, False]), tmp_path / "traversals.png")
    axes = saved[0].axes[0]
    for row, strip in enumerate(strips):
        left, right, bottom, top = axes.images[4 * row + strip.base].get_extent()
        frame = axes.patches[1 + row].get_bbox()
        assert (frame.x0, frame.x1, frame.y1, frame.y0) == pytest.approx((left, right, bottom, top))
    opacities = [image.get_alpha() for image in axes.images]
    assert opacities[:4] == [1.0] * 4
    assert max(opacities[4:]) < 0.5


def test_images_that_are_not_square(tmp_path: Path, saved: list[Figure]) -> None:
    figures.plot_traversals(random_strips([3], 8, 16), np.array([True]), tmp_path / "traversals.png")
    images = torch.rand(3, 3, 8, 16, generator=torch.Generator().manual_seed(0))
    figures.plot_reconstructions(images, images, tmp_path / "reconstructions.png")
    for figure, name in zip(saved, ("traversals.png", "reconstructions.png"), strict=True):
        check(figure, tmp_path / name)
        for image in figure.axes[0].images:
            left, right, bottom, top = image.get_extent()
            assert (bottom - top) / (right - left) == pytest.approx(0.5)


@pytest.mark.parametrize("count", [1, 8, 11])
def test_reconstructions(count: int, tmp_path: Path, saved: list[Figure]) -> None:
    images = torch.zeros(count, 3, 8, 8)
    figures.plot_reconstructions(images, images + 0.1, tmp_path / "reconstructions.png")
    check(saved[0], tmp_path / "reconstructions.png")
    axes = saved[0].axes[0]
    assert len(axes.images) == 2 * count
    assert [text.get_text() for text in axes.texts].count("20.0 dB") == count


def write_metrics(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def panel_titles(figure: Figure) -> list[str]:
    return [axes.get_title() for axes in figure.axes if axes.get_title()]


def test_curves(tmp_path: Path, saved: list[Figure]) -> None:
    header = "step,train_loss,train_psnr,train_quantization,infom,infoc,infoe,psnr,active,mean_perplexity"
    rows = [f"{step},0.5,30,0.001,0.8,0.5,0.9,29,{step // 1000},7.5" for step in range(2000, 10001, 2000)]
    metrics = write_metrics(tmp_path / "metrics.csv", "\n".join([header, *rows]) + "\n")
    figures.plot_curves(metrics, tmp_path / "curves.png")
    check(saved[0], tmp_path / "curves.png")
    assert panel_titles(saved[0]) == [
        "InfoMEC on evaluation images",
        "Reconstruction",
        "Active latents on evaluation images",
        "Training loss",
        "Quantization and commitment loss",
        "Perplexity on evaluation images",
    ]
    active = saved[0].axes[2].lines[0]
    assert active.get_xydata().tolist() == [[step, step / 1000] for step in range(2000, 10001, 2000)]


def test_curves_of_losses_have_more_points_than_scores(tmp_path: Path, saved: list[Figure]) -> None:
    text = "step,train_loss,psnr\n1,9,\n2,8,20\n3,7,\n4,6,21\n"
    figures.plot_curves(write_metrics(tmp_path / "metrics.csv", text), tmp_path / "curves.png")
    psnr, loss = (axes.lines[0].get_xydata().tolist() for axes in saved[0].axes)
    assert psnr == [[2.0, 20.0], [4.0, 21.0]]
    assert loss == [[1.0, 9.0], [2.0, 8.0], [3.0, 7.0], [4.0, 6.0]]


def test_curves_of_a_gan_show_both_losses_and_the_gap(tmp_path: Path, saved: list[Figure]) -> None:
    text = "step,train_critic_loss,train_critic_gap,train_generator_loss\n4,9,1.5,\n8,8,1.25,-2\n"
    figures.plot_curves(write_metrics(tmp_path / "metrics.csv", text), tmp_path / "curves.png")
    check(saved[0], tmp_path / "curves.png")
    losses, gap = (axes.lines for axes in saved[0].axes)
    assert [line.get_label() for line in losses] == ["critic", "generator"]
    assert losses[1].get_xydata().tolist() == [[8.0, -2.0]]
    assert gap[0].get_xydata().tolist() == [[4.0, 1.5], [8.0, 1.25]]


@pytest.mark.parametrize("count", [1, 8, 20])
def test_samples(count: int, tmp_path: Path, saved: list[Figure]) -> None:
    figures.plot_samples(torch.rand(count, 3, 8, 16), tmp_path / "samples.png")
    check(saved[0], tmp_path / "samples.png")
    assert len(saved[0].axes[0].images) == count


def test_traversals_say_what_the_numbers_are(tmp_path: Path, saved: list[Figure]) -> None:
    strip = random_strips([3])[0]
    figures.plot_traversals([strip], np.array([True]), tmp_path / "range.png", spacing="even")
    numbered = replace(strip, values=np.array([3, 17, 511]))
    figures.plot_traversals([numbered], np.array([True]), tmp_path / "codes.png")
    texts = [{text.get_text() for text in figure.axes[0].texts} for figure in saved]
    assert {"Each row moves one latent through its range", "-0.50", "0.00", "0.50"} <= texts[0]
    assert "the base image's own value; the others are even" in texts[0]
    assert {"the base image's own code; numbers are codes", "3", "17", "511"} <= texts[1]


def test_curves_without_factors_with_gaps_and_other_columns(tmp_path: Path, saved: list[Figure]) -> None:
    text = "step,train_loss,psnr,train_critic,train_nothing\n1000,0.5,,1.5,\n2000,0.4,25.0,,\n"
    figures.plot_curves(write_metrics(tmp_path / "metrics.csv", text), tmp_path / "curves.png")
    check(saved[0], tmp_path / "curves.png")
    assert panel_titles(saved[0]) == ["Reconstruction", "Training loss", "train critic"]
    assert saved[0].axes[0].lines[0].get_xydata().tolist() == [[2000.0, 25.0]]


@pytest.mark.parametrize("text", ["", "step,train_loss\n"])
def test_curves_before_the_first_evaluation(text: str, tmp_path: Path, saved: list[Figure]) -> None:
    figures.plot_curves(write_metrics(tmp_path / "metrics.csv", text), tmp_path / "curves.png")
    check(saved[0], tmp_path / "curves.png")
    assert saved[0].texts[0].get_text() == "no evaluation was recorded"


def test_told_factors() -> None:
    sources = np.indices((2, 2)).reshape(2, -1).T
    scores = infomec(sources[:, ::-1], sources)
    assert figures.told_factors(scores, ["hue", "scale"]) == ["scale, NMI 1.00", "hue, NMI 1.00"]
    assert figures.told_factors(None, []) is None


def test_a_run_gets_all_its_figures(tmp_path: Path) -> None:
    dataset = load_dataset("rooms3d", resolution=16)
    config = TrainConfig(num_latents=3, levels=4, resolution=16, network="compact")
    torch.manual_seed(0)
    method = build_method(config, dataset.image_shape)
    evaluation = evaluate(method, dataset, torch.arange(0, len(dataset), 24_001))
    run = RunFolder(tmp_path)
    run.write_metrics([{"step": 1} | evaluation.row()])
    figures.write_figures(run, method, dataset, replace(evaluation, infomec=None))
    without_factors = {"curves.png", "reconstructions.png", "traversals.png", "code_usage.png"}
    assert {path.name for path in run.figures.iterdir()} == without_factors
    figures.write_figures(run, method, dataset, evaluation)
    assert {path.name for path in run.figures.iterdir()} == without_factors | {"nmi.png"}


@pytest.mark.parametrize("name", ["qlinfowgan-gp", "infowgan-gp"])
def test_a_gans_traversals_start_from_its_first_sample(
    tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    drawn: dict[str, torch.Tensor] = {}
    monkeypatch.setattr(figures, "plot_samples", lambda images, path: drawn.update(sample=images[0]))
    monkeypatch.setattr(figures, "plot_traversals", lambda strips, *_, **__: drawn.update(strips=strips))
    for other in ("plot_curves", "plot_reconstructions", "plot_code_usage", "plot_nmi"):
        monkeypatch.setattr(figures, other, lambda *_: None)
    torch.manual_seed(0)
    method = build_method(TrainConfig(method=name, num_latents=3), tiny.image_shape)
    with torch.no_grad():
        # in the order of its values the codebook is not in that of its codes
        if name == "qlinfowgan-gp":
            method.latent.quantizer.codebook.copy_(method.latent.quantizer.codebook.flip(1))
    figures.write_figures(RunFolder(tmp_path), method, tiny, evaluate(method, tiny, torch.arange(64)))
    for strip in drawn["strips"]:
        torch.testing.assert_close(strip.images[strip.base], drawn["sample"])


def test_factors_are_varied_alone(tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(figures, "_draw", lambda axes, image, *place: drawn.append(image[:, 0, 0] * 3))
    # index 27 is red 1, green 2, blue 3
    plot_factors(tiny, tmp_path / "factors.png", image=27)
    rows = torch.stack(drawn).round().long().view(3, 4, 3)
    for factor in range(3):
        expected = torch.tensor([1, 2, 3]).repeat(4, 1)
        expected[:, factor] = torch.arange(4)
        assert torch.equal(rows[factor], expected)


def test_of_many_values_some_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(figures, "_draw", lambda *arguments: drawn.append(arguments))
    plot_factors(Rooms3D(16), tmp_path / "factors.png", max_values=5)
    # five of each but shape's four
    assert len(drawn) == 5 * 5 + 4


def test_the_picture_of_factors_has_room_for_long_names(
    tiny: Dataset, saved: list[Figure], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    longest = replace(tiny.factors[0], name="lighting_intensity_of_the_room")
    monkeypatch.setattr(tiny, "factors", (longest, *tiny.factors[1:]))
    plot_factors(tiny, tmp_path / "factors.png")
    check(saved[0], tmp_path / "factors.png")
