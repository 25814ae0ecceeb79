"""All pictures of a run, each written by one function into one PNG file.

The colours are those of Okabe and Ito, safe for the colour-blind, and no meaning lies in colour alone.
"""

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FixedLocator, MaxNLocator, StrMethodFormatter
from torch import Tensor

from qlae.data import Dataset
from qlae.data.base import index_of_factors
from qlae.evaluation import Evaluation, TraversalStrip, draw, draw_codes, spread, traverse
from qlae.methods.base import Method
from qlae.metrics import InfoMEC, psnr_per_image
from qlae.run_folder import RunFolder

BLUE, VERMILLION, GREEN, ORANGE = "#0072B2", "#D55E00", "#009E73", "#E69F00"
GREY, LIGHT_GREY = "#6B6B6B", "#E4E4E4"
LINE_STYLES = ((BLUE, "-", "o"), (VERMILLION, "--", "s"), (GREEN, "-.", "^"), (ORANGE, ":", "D"))

HATCH = {"facecolor": LIGHT_GREY, "edgecolor": "#9A9A9A", "hatch": "////", "linewidth": 0.0}

DOTS_PER_INCH = 150
TEXT, SMALL_TEXT = 9.0, 7.5

# Sizes in inches, of pictures made of tiles.
TILE, GAP, MARGIN = 0.72, 0.06, 0.15
MAX_FACTOR_VALUES = 16
GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0

# images drawn from a GAN's prior
SAMPLES = 64

# Title, name of the vertical axis, and columns of metrics.csv with their names for a person.
PANELS: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("InfoMEC on evaluation images", "score", {"infom": "InfoM", "infoc": "InfoC", "infoe": "InfoE"}),
    ("Reconstruction", "PSNR in dB", {"train_psnr": "training", "psnr": "evaluation"}),
    ("Active latents on evaluation images", "latents", {"active": "active"}),
    ("Training loss", "loss", {"train_loss": "total", "train_reconstruction": "reconstruction"}),
    (
        "Training losses of critic and generator",
        "loss",
        {"train_critic_loss": "critic", "train_generator_loss": "generator"},
    ),
    ("Critic's gap (Wasserstein estimate)", "value", {"train_critic_gap": "real less generated"}),
    ("Gradient penalty", "loss", {"train_gradient_penalty": "training"}),
    ("Drawn and inferred latents' difference", "loss", {"train_latent": "training"}),
    (
        "Quantization and commitment loss",
        "loss",
        {"train_quantization": "training", "train_commitment": "commitment apart"},
    ),
    ("KL divergence", "loss", {"train_kl": "training"}),
    (
        "KL divergence, taken apart",
        "loss",
        {
            "train_mutual_information": "mutual information",
            "train_total_correlation": "total correlation",
            "train_dimension_wise_kl": "per latent",
        },
    ),
    ("Latents' losses", "loss", {"train_nonnegativity": "nonnegativity", "train_activity": "activity"}),
    ("Perplexity on evaluation images", "codes per latent", {"mean_perplexity": "mean over latents"}),
)
NOT_DRAWN = frozenset({"step", "learning_rate"})


def write_figures(run: RunFolder, method: Method, dataset: Dataset, evaluation: Evaluation) -> None:
    """Writes every figure of a run into its folder `figures`, in place of older ones.

    The traversals start from the middle one of the evaluation's example images; of a method that learns to generate,
    from the first of its samples.
    """
    folder = run.figures
    folder.mkdir(exist_ok=True)
    factors = [factor.name for factor in dataset.factors]
    base = draw_codes(method, SAMPLES)[0] if method.generative else evaluation.codes[len(evaluation.codes) // 2]
    strips = traverse(method, base, evaluation.positions)
    plot_curves(run.metrics_file, folder / "curves.png")
    plot_reconstructions(evaluation.inputs, evaluation.reconstructions, folder / "reconstructions.png")
    if evaluation.usage is not None:
        plot_code_usage(evaluation.usage, evaluation.perplexity, folder / "code_usage.png")
    if method.generative:
        plot_samples(draw(method, SAMPLES), folder / "samples.png")
    told = told_factors(evaluation.infomec, factors)
    spacing = method.latent.spacing
    plot_traversals(strips, evaluation.active, folder / "traversals.png", told=told, spacing=spacing)
    if evaluation.infomec is not None:
        plot_nmi(evaluation.infomec, factors, folder / "nmi.png")


def plot_curves(metrics_file: Path, path: Path) -> None:
    """Losses and scores over the training steps, one panel for each kind.

    Args:
        metrics_file: CSV with a column `step` and the columns that `PANELS` names, as far as it has them.
            Any other column gets a panel of its own; an empty cell is a point left out.
        path: the PNG file to write.
    """
    table = _read_columns(metrics_file)
    panels = _panels_of(table)
    columns = min(3, max(1, len(panels)))
    rows = max(1, math.ceil(len(panels) / columns))
    figure = _figure(4.0 * columns, 2.8 * rows)
    for axes in figure.subplots(rows, columns, squeeze=False).flat[len(panels) :]:
        axes.set_axis_off()
    for axes, (title, unit, names) in zip(figure.axes, panels, strict=False):
        _plot_panel(axes, table, title, unit, names)
    if not panels:
        figure.text(0.5, 0.5, "no evaluation was recorded", ha="center", va="center", fontsize=TEXT)
    _save(figure, path)


def plot_reconstructions(images: Tensor, reconstructions: Tensor, path: Path, *, columns: int = 8) -> None:
    """Each image above what the model makes of it, with the PSNR of the pair.

    Args:
        images: float32 [E, 3, H, W] in [0, 1], E >= 1.
        reconstructions: the same shape.
        path: the PNG file to write.
        columns: most pairs in a row.
    """
    ratios = psnr_per_image(images, reconstructions).tolist()
    tile, label, caption = 1.0, 0.35, 0.3
    height = tile * images.shape[2] / images.shape[3]
    columns = min(columns, len(images))
    block_height = 2 * height + GAP + caption
    blocks = math.ceil(len(images) / columns)
    axes = _canvas(label + columns * (tile + GAP) + MARGIN, MARGIN + blocks * block_height)
    for position, (image, reconstruction) in enumerate(zip(images, reconstructions, strict=True)):
        block, column = divmod(position, columns)
        left, top = label + column * (tile + GAP), MARGIN + block * block_height
        below = top + height + GAP
        _draw(axes, image, left, top, tile)
        _draw(axes, reconstruction, left, below, tile)
        _write(axes, f"{ratios[position]:.1f} dB", left + tile / 2, below + height + 0.04, va="top")
        if column == 0:
            names = {"input": top, "output": below}
            for name, row in names.items():
                _write(axes, name, label / 2, row + height / 2, size=TEXT, va="center", rotation=90)
    _save(axes.get_figure(), path)


def plot_traversals(
    strips: Sequence[TraversalStrip],
    active: np.ndarray,
    path: Path,
    *,
    told: Sequence[str] | None = None,
    spacing: str | None = None,
) -> None:
    """One row per latent: the image as that latent moves through its codes, or through its range, ascending.

    The base image's own code is framed and the rows of inactive latents are faded and named so.

    Args:
        strips: D strips, D >= 1; their lengths may differ.
        active: bool [D].
        path: the PNG file to write.
        told: what each latent tells, D texts to write under its name; `told_factors` makes them.
        spacing: what the values of continuous latents are, `Latent.spacing`; None for latents with codes.
    """
    names = [_told(latent, bool(active[latent]), told) for latent in range(len(strips))]
    caption, head = 0.22, 0.62
    # The small text's letters are on average a little narrower than this.
    label = max(1.1, 0.3 + 0.066 * max(len(name) for name in names))
    height = TILE * strips[0].images.shape[2] / strips[0].images.shape[3]
    row_height = height + caption
    longest = max(len(strip.images) for strip in strips)
    width = max(label + longest * (TILE + GAP) + MARGIN, 5.2)
    axes = _canvas(width, head + len(strips) * row_height + MARGIN)
    what = "codes" if spacing is None else "range"
    title = f"Each row moves one latent through its {what}, from the smallest to the largest"
    _write(axes, title if width > 6 else title.split(",")[0], MARGIN, 0.2, size=TEXT, ha="left", va="center")
    axes.add_patch(_frame(MARGIN, 0.36, 0.13, 0.13))
    own = "code; numbers are code values" if spacing is None else f"value; the others are {spacing}"
    if strips[0].values.dtype.kind != "f":
        own = "code; numbers are codes"
    _write(axes, f"the base image's own {own}", 0.36, 0.43, ha="left", va="center")
    for latent, strip in enumerate(strips):
        top = head + latent * row_height
        _name_latent(axes, latent, names[latent], label - 0.12, top + height / 2, active[latent])
        _draw_strip(axes, strip, label, top, opacity=1.0 if active[latent] else 0.35)
    _save(axes.get_figure(), path)


def plot_samples(images: Tensor, path: Path, *, columns: int = 8) -> None:
    """Images that a generator makes of latents drawn from their prior, row by row.

    Args:
        images: float32 [S, 3, H, W] in [0, 1], S >= 1.
        path: the PNG file to write.
        columns: most images in a row.
    """
    columns = min(columns, len(images))
    height = TILE * images.shape[2] / images.shape[3]
    rows = math.ceil(len(images) / columns)
    width = 2 * MARGIN + columns * (TILE + GAP) - GAP
    axes = _canvas(width, 2 * MARGIN + rows * (height + GAP) - GAP)
    for position, image in enumerate(images):
        row, column = divmod(position, columns)
        _draw(axes, image, MARGIN + column * (TILE + GAP), MARGIN + row * (height + GAP), TILE)
    _save(axes.get_figure(), path)


def plot_factors(
    dataset: Dataset, path: Path, *, image: int | None = None, max_values: int = MAX_FACTOR_VALUES
) -> None:
    """One row per factor: an image of the set as that factor alone takes each of its values in turn.

    The image's own value is framed. Numbers are the values' positions, from 0.

    Args:
        dataset: one with factors.
        path: the PNG file to write.
        image: index of the image to start from; None takes a fixed one.
        max_values: of a factor with more values, this many evenly spread ones are shown, the image's own among them.
    """
    base = _base_sources(dataset, image)
    rows = [spread(factor.size, max_values, int(own)) for factor, own in zip(dataset.factors, base, strict=True)]
    _, height, width = dataset.image_shape
    caption, head = 0.22, 0.62
    # the normal text's letters are on average a little narrower than this
    label = 0.3 + 0.08 * max(len(factor.name) for factor in dataset.factors)
    row_height = TILE * height / width + caption
    total = max(label + max(map(len, rows)) * (TILE + GAP) + MARGIN, 6.4)
    axes = _canvas(total, head + len(rows) * row_height + MARGIN)
    title = f"{dataset.name}: each row varies one factor of the same image"
    _write(axes, title, MARGIN, 0.2, size=TEXT, ha="left", va="center")
    axes.add_patch(_frame(MARGIN, 0.36, 0.13, 0.13))
    _write(axes, "the image itself; numbers are positions of values", 0.36, 0.43, ha="left", va="center")
    for position, (factor, values) in enumerate(zip(dataset.factors, rows, strict=True)):
        top = head + position * row_height
        middle = top + (row_height - caption) / 2
        _write(axes, factor.name, label - 0.12, middle - 0.09, size=TEXT, ha="right", va="center")
        count = f"{factor.size} values"
        _write(axes, count, label - 0.12, middle + 0.09, color=GREY, ha="right", va="center")
        _draw_values(axes, dataset, base, position, values, label, top)
    _save(axes.get_figure(), path)


def plot_nmi(scores: InfoMEC, factors: Sequence[str], path: Path) -> None:
    """The matrix of normalised mutual information between sources (rows) and latents (columns).

    Args:
        scores: nmi [n_s, n_z], with inactive latents and constant sources hatched.
        factors: names of the n_s sources.
        path: the PNG file to write.
    """
    num_sources, num_latents = scores.nmi.shape
    roomy = num_latents <= 24
    width = 2.9 + (0.42 if roomy else 0.2) * num_latents
    figure = _figure(max(width, 5.0), max(1.5 + 0.36 * num_sources, 2.3))
    axes = figure.add_subplot()
    image = axes.imshow(scores.nmi, cmap="Blues", vmin=0.0, vmax=1.0, aspect="auto")
    if roomy:
        _write_nmi(axes, scores)
    _hatch(axes, [(latent - 0.5, -0.5, 1, num_sources) for latent in np.flatnonzero(~scores.active)])
    _hatch(axes, [(-0.5, source - 0.5, num_latents, 1) for source in np.flatnonzero(~scores.varying)])
    _label_cells(axes, scores, factors, roomy)
    title = f"InfoM {scores.infom:.2f}     InfoC {scores.infoc:.2f}     InfoE {scores.infoe:.2f}"
    axes.set_title(title, fontsize=TEXT + 2, pad=8)
    bar = figure.colorbar(image, ax=axes, pad=0.015, fraction=0.05)
    bar.set_label("I(source; latent) / H(source)", fontsize=SMALL_TEXT)
    bar.ax.tick_params(labelsize=SMALL_TEXT)
    bar.outline.set_visible(False)
    _explain_hatch(figure, inactive=not scores.active.all(), constant=not scores.varying.all())
    _save(figure, path)


def plot_code_usage(usage: Sequence[np.ndarray], perplexity: np.ndarray, path: Path) -> None:
    """How often each latent takes each of its codes, one panel per latent; dead codes are marked.

    Args:
        usage: counts per code, D >= 1 arrays int64 [levels of the latent].
        perplexity: float64 [D].
        path: the PNG file to write.
    """
    columns = min(len(usage), 4 if len(usage) <= 16 else 8)
    rows = math.ceil(len(usage) / columns)
    figure = _figure(max(2.5 * columns + 0.4, 5.2), 1.75 * rows + 0.7)
    for axes in figure.subplots(rows, columns, squeeze=False).flat[len(usage) :]:
        axes.set_axis_off()
    for latent, (axes, counts) in enumerate(zip(figure.axes, usage, strict=False)):
        _plot_usage(axes, counts)
        axes.set_title(
            f"latent {latent}: perplexity {perplexity[latent]:.1f} of {len(counts)}",
            fontsize=SMALL_TEXT + 0.5,
            color="black" if np.count_nonzero(counts) > 1 else GREY,
        )
    dead = sum(int((counts == 0).sum()) for counts in usage)
    total = sum(len(counts) for counts in usage)
    title = f"Use of codes: {dead} of {total} codes never taken (x); dashed line: even use"
    figure.suptitle(title, fontsize=TEXT)
    figure.supxlabel("code", fontsize=TEXT)
    figure.supylabel("share of images", fontsize=TEXT)
    _save(figure, path)


def told_factors(scores: InfoMEC | None, factors: Sequence[str]) -> list[str] | None:
    """For each latent the factor it tells most about, with their NMI, as text; None without scores."""
    if scores is None:
        return None
    strongest = scores.nmi.argmax(axis=0)
    return [f"{factors[source]}, NMI {scores.nmi[source, latent]:.2f}" for latent, source in enumerate(strongest)]


def _figure(width: float, height: float) -> Figure:
    """An empty figure of that size in inches, of its own canvas rather than pyplot's."""
    figure = Figure(figsize=(width, height), dpi=DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _canvas(width: float, height: float) -> Axes:
    """Axes that fill a figure, with inches from the top left corner as coordinates."""
    figure = Figure(figsize=(width, height), dpi=DOTS_PER_INCH)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0), xlim=(0.0, width), ylim=(height, 0.0))
    axes.set_axis_off()
    return axes


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, format="png", facecolor="white")


def _draw(axes: Axes, image: Tensor, left: float, top: float, width: float, alpha: float = 1.0) -> None:
    """Puts an image [3, H, W] on a canvas."""
    height = width * image.shape[1] / image.shape[2]
    axes.imshow(
        image.permute(1, 2, 0).clamp(0.0, 1.0).numpy(),
        extent=(left, left + width, top + height, top),
        interpolation="nearest",
        alpha=alpha,
        aspect="auto",
    )
    # imshow has moved the limits to the image it drew.
    figure_width, figure_height = axes.get_figure().get_size_inches()
    axes.set(xlim=(0.0, figure_width), ylim=(figure_height, 0.0))


def _write(
    axes: Axes,
    text: str,
    x: float,
    y: float,
    *,
    size: float = SMALL_TEXT,
    ha: str = "center",
    **style: object,
) -> None:
    axes.text(x, y, text, fontsize=size, ha=ha, **style)


def _frame(left: float, top: float, width: float, height: float) -> Rectangle:
    return Rectangle((left, top), width, height, fill=False, edgecolor=VERMILLION, linewidth=2.2)


def _told(latent: int, active: bool, told: Sequence[str] | None) -> str:
    if not active:
        return "inactive"
    return "" if told is None else told[latent]


def _name_latent(axes: Axes, latent: int, caption: str, right: float, middle: float, active: bool) -> None:
    offset = 0.09 if caption else 0.0
    style = {"ha": "right", "va": "center"}
    colour = "black" if active else GREY
    _write(axes, f"latent {latent}", right, middle - offset, size=TEXT, color=colour, **style)
    _write(axes, caption, right, middle + offset, color=GREY, **style)


def _draw_strip(axes: Axes, strip: TraversalStrip, left: float, top: float, opacity: float) -> None:
    """Puts a strip's images in a row, its code values below them, and a frame around the base's own."""
    height = TILE * strip.images.shape[2] / strip.images.shape[3]
    for position, (image, value) in enumerate(zip(strip.images, strip.values, strict=True)):
        x = left + position * (TILE + GAP)
        _draw(axes, image, x, top, TILE, opacity)
        style = {"color": GREY}
        if position == strip.base:
            axes.add_patch(_frame(x, top, TILE, height))
            style = {"color": VERMILLION, "weight": "bold"}
        # a code without a value is its number
        text = f"{value:z.2f}" if strip.values.dtype.kind == "f" else str(value)
        _write(axes, text, x + TILE / 2, top + height + 0.03, va="top", **style)


def _base_sources(dataset: Dataset, image: int | None) -> Tensor:
    """Factor positions, int64 [n_s], of an image; without one, of one in which factors of equal size differ."""
    if image is None:
        # multiples of the golden ratio, modulo 1, lie far from each other
        return torch.tensor([int(factor.size * (GOLDEN * (i + 1) % 1.0)) for i, factor in enumerate(dataset.factors)])
    return dataset.sources(torch.tensor([image]))[0].cpu()


def _draw_values(
    axes: Axes, dataset: Dataset, base: Tensor, position: int, values: np.ndarray, left: float, top: float
) -> None:
    """Puts the images in which factor `position` has each of `values` in a row, the base's own in a frame."""
    sources = base.repeat(len(values), 1)
    sources[:, position] = torch.from_numpy(values)
    images = dataset.images(index_of_factors(sources, dataset.factors)).cpu()
    height = TILE * images.shape[2] / images.shape[3]
    for column, (image, value) in enumerate(zip(images, values, strict=True)):
        x = left + column * (TILE + GAP)
        _draw(axes, image, x, top, TILE)
        style = {"color": GREY}
        if value == base[position]:
            axes.add_patch(_frame(x, top, TILE, height))
            style = {"color": VERMILLION, "weight": "bold"}
        _write(axes, str(value), x + TILE / 2, top + height + 0.03, va="top", **style)


def _read_columns(metrics_file: Path) -> dict[str, list[float | None]]:
    with metrics_file.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    names = rows[0] if rows else ()
    return {name: [float(row[name]) if row[name] else None for row in rows] for name in names}


def _panels_of(table: Mapping[str, list[float | None]]) -> list[tuple[str, str, dict[str, str]]]:
    recorded = [column for column, cells in table.items() if any(cell is not None for cell in cells)]
    panels = []
    known = set(NOT_DRAWN)
    for title, unit, names in PANELS:
        known |= names.keys()
        present = {column: name for column, name in names.items() if column in recorded}
        if present:
            panels.append((title, unit, present))
    others = [column for column in recorded if column not in known]
    return panels + [(column.replace("_", " "), "", {column: column}) for column in others]


def _plot_panel(
    axes: Axes, table: Mapping[str, list[float | None]], title: str, unit: str, names: Mapping[str, str]
) -> None:
    for (column, name), (colour, line, marker) in zip(names.items(), LINE_STYLES, strict=False):
        points = [pair for pair in zip(table["step"], table[column], strict=True) if pair[1] is not None]
        steps, values = zip(*points, strict=True)
        # Markers show single points, and would hide a line of many.
        size = 4.0 if len(points) <= 30 else 0.0
        axes.plot(steps, values, line, color=colour, marker=marker, markersize=size, label=name)
    axes.set_title(title, fontsize=TEXT + 1)
    axes.set_xlabel("step", fontsize=TEXT)
    axes.set_ylabel(unit, fontsize=TEXT)
    axes.tick_params(labelsize=SMALL_TEXT + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_xlim(0, 1.04 * max(table["step"]))
    axes.grid(color=LIGHT_GREY, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if set(names) <= {"infom", "infoc", "infoe"}:
        axes.set_ylim(-0.02, 1.02)
    if "active" in names:
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set_ylim(0, max(axes.get_ylim()[1], 1) * 1.1)
    if len(names) > 1:
        axes.legend(fontsize=SMALL_TEXT + 0.5, frameon=False)


def _write_nmi(axes: Axes, scores: InfoMEC) -> None:
    for source, latent in np.argwhere(scores.varying[:, None] & scores.active):
        value = scores.nmi[source, latent]
        text = f"{value:.2f}".removeprefix("0") if value < 0.995 else "1"
        colour = GREY if value < 0.1 else "black" if value < 0.55 else "white"
        _write(axes, text, latent, source, va="center", color=colour)


def _label_cells(axes: Axes, scores: InfoMEC, factors: Sequence[str], roomy: bool) -> None:
    num_sources, num_latents = scores.nmi.shape
    labels = [str(latent) for latent in range(num_latents)]
    axes.set_xticks(range(num_latents), labels, rotation=0 if roomy else 90)
    axes.set_yticks(range(num_sources), factors)
    axes.tick_params(axis="x", length=0, labelsize=SMALL_TEXT if roomy else 6.5)
    axes.tick_params(axis="y", length=0, labelsize=TEXT)
    for latent in np.flatnonzero(~scores.active):
        axes.get_xticklabels()[latent].set_color(GREY)
    axes.set_xlabel("latent", fontsize=TEXT)
    axes.set_ylabel("source", fontsize=TEXT)
    # White lines between the cells.
    axes.set_xticks(np.arange(num_latents + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(num_sources + 1) - 0.5, minor=True)
    axes.tick_params(which="minor", length=0)
    axes.grid(which="minor", color="white", linewidth=1.0)
    axes.spines[:].set_visible(False)


def _hatch(axes: Axes, boxes: Iterable[tuple[float, float, float, float]]) -> None:
    for left, top, width, height in boxes:
        axes.add_patch(Rectangle((left, top), width, height, **HATCH))


def _explain_hatch(figure: Figure, *, inactive: bool, constant: bool) -> None:
    meanings = ["inactive latent"] * inactive + ["constant source"] * constant
    if meanings:
        label = " or ".join(meanings)
        figure.legend(
            handles=[Patch(label=label, **HATCH)],
            loc="outside lower right",
            fontsize=SMALL_TEXT,
            frameon=False,
        )


def _plot_usage(axes: Axes, counts: np.ndarray) -> None:
    codes = np.arange(len(counts))
    shares = counts / counts.sum()
    dead = codes[counts == 0]
    axes.bar(codes, shares, width=0.8 if len(counts) <= 64 else 1.0, color=BLUE)
    axes.axhline(1 / len(counts), color=GREY, linewidth=0.8, linestyle="--")
    size = 5.0 if len(counts) <= 32 else 2.5
    marks = axes.plot(dead, np.zeros(len(dead)), "x", color=VERMILLION, markersize=size, markeredgewidth=1.4)
    # The marks sit on the axis, and the layout is not to make room for them.
    marks[0].set(clip_on=False, zorder=3, in_layout=False)
    axes.set_xlim(-0.6, len(counts) - 0.4)
    axes.set_ylim(0.0, max(1.1 * shares.max(), 1.5 / len(counts)))
    axes.xaxis.set_major_locator(FixedLocator(codes) if len(counts) <= 10 else MaxNLocator(6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(3))
    axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.3g}%")
    axes.tick_params(labelsize=SMALL_TEXT - 0.5)
    axes.spines[["top", "right"]].set_visible(False)
