"""Scores of a trained model on the images kept for evaluation, and what its figures show."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from qlae.data import Dataset
from qlae.methods.base import Method
from qlae.metrics import InfoMEC, active_latents, code_counts, infomec, perplexity, psnr_per_image

# the variant of InfoMEC that runs are scored by (docs/metrics.md)
PROTOCOL = "standalone"

EXAMPLES = 16
MAX_STRIP_CODES = 16


@dataclass(frozen=True)
class Evaluation:
    """What a model with D latents does on N images.

    Attributes:
        infomec: scores of the codes against the data's factors; None where the data has no factors.
        psnr: mean over the images of each one's peak signal-to-noise ratio, in dB.
        usage: for each latent how often each of its codes was taken, D arrays int64 [levels of the latent]; None
            where latents are continuous.
        perplexity: effective number of codes, float64 [D]; None where latents are continuous.
        active: bool [D], latents that take more than one code, or whose range is more than 1/20 of the largest.
        images: N.
        inputs: E images of the N, evenly spread over them, float32 [E, 3, H, W] in [0, 1] on the CPU.
        reconstructions: what the model makes of `inputs`, the same shape.
        codes: those of `inputs`, [E, D] on the CPU, integers where latents are discrete.
        positions: codes that a traversal moves each latent through, D tensors on the CPU.
    """

    infomec: InfoMEC | None
    psnr: float
    usage: list[np.ndarray] | None
    perplexity: np.ndarray | None
    active: np.ndarray
    images: int
    inputs: Tensor
    reconstructions: Tensor
    codes: Tensor
    positions: list[Tensor]

    def row(self) -> dict[str, float]:
        """Numbers by name, for a table: infom, infoc, infoe (with factors), psnr, active, mean_perplexity (with codes
        to count)."""
        scores = {} if self.infomec is None else _infomec_scores(self.infomec)
        use = {} if self.perplexity is None else {"mean_perplexity": float(self.perplexity.mean())}
        return scores | {"psnr": self.psnr, "active": int(self.active.sum())} | use

    def summary(self) -> dict[str, object]:
        """Scores for JSON: InfoMEC's are None without factors; perplexity has one number a latent, or is None where
        latents are continuous."""
        scores = {"infom": None, "infoc": None, "infoe": None, "infoe_converged": None}
        if self.infomec is not None:
            scores = _infomec_scores(self.infomec) | {"infoe_converged": self.infomec.converged}
        return scores | {
            "psnr": self.psnr,
            "active": int(self.active.sum()),
            "num_latents": len(self.active),
            "perplexity": None if self.perplexity is None else self.perplexity.tolist(),
            "evaluation_images": self.images,
        }

    def line(self) -> str:
        """One line for a person."""
        parts = [f"PSNR {self.psnr:.1f} dB", f"{self.active.sum()} of {len(self.active)} latents active"]
        if self.infomec is not None:
            scores = self.infomec
            parts.insert(0, f"InfoM {scores.infom:.3f}, InfoC {scores.infoc:.3f}, InfoE {scores.infoe:.3f}")
        return ", ".join(parts)


@dataclass(frozen=True)
class TraversalStrip:
    """One latent moved through its codes, or its range, all others kept.

    Attributes:
        images: float32 [C, 3, H, W] in [0, 1] on the CPU.
        codes: the latent's code in each image, [C].
        values: the codes' values, ascending, float64 [C]; codes without a value stand for themselves, as integers.
        base: position in the strip of the code that the base image has.
    """

    images: Tensor
    codes: np.ndarray
    values: np.ndarray
    base: int


@torch.no_grad()
def evaluate(model: Method, dataset: Dataset, index: Tensor, *, batch_size: int = 500) -> Evaluation:
    """Scores `model` on the images of `index`, in batches.

    Draws no random numbers and leaves the model as it was.

    Args:
        index: int64 [N], N >= 1; N >= 2 where the data has factors.
        batch_size: images encoded and decoded at a time.

    Raises:
        ValueError: for an empty index, or a single image of data with factors.
    """
    if len(index) == 0:
        raise ValueError("evaluate needs at least one image, got an empty index")
    all_codes, ratios = [], []
    with _evaluation_mode(model):
        for batch in index.split(batch_size):
            images = dataset.images(batch)
            batch_codes, reconstructions = model.encode_and_reconstruct(images)
            all_codes.append(batch_codes.cpu())
            ratios.append(psnr_per_image(images, reconstructions).cpu())
        inputs = dataset.images(_evenly_spaced(index, EXAMPLES))
        example_codes, reconstructions = model.encode_and_reconstruct(inputs)
    codes = torch.cat(all_codes)
    levels = model.latent.levels
    discrete = model.latent.discrete
    sources = torch.cat([dataset.sources(batch).cpu() for batch in index.split(batch_size)])
    return Evaluation(
        infomec=infomec(codes, sources, discrete=discrete, protocol=PROTOCOL) if dataset.factors else None,
        psnr=float(torch.cat(ratios).mean()),
        usage=code_counts(codes, levels) if discrete else None,
        perplexity=perplexity(codes, levels) if discrete else None,
        active=active_latents(codes, discrete=discrete),
        images=len(codes),
        inputs=inputs.cpu(),
        reconstructions=reconstructions.cpu(),
        codes=example_codes.cpu(),
        positions=[positions.cpu() for positions in model.latent.positions(codes)],
    )


@torch.no_grad()
def traverse(
    model: Method, base: Tensor, positions: Sequence[Tensor], *, max_codes: int = MAX_STRIP_CODES
) -> list[TraversalStrip]:
    """One strip for each latent, starting from the image that the codes `base` stand for.

    Args:
        base: codes of the base image, [D].
        positions: for each latent the codes to move it through, in order; `Evaluation.positions`. The one next to the
            base's own gives way to it.
        max_codes: of a latent with more positions, this many evenly spread ones are shown, the base's among them.

    Returns:
        D strips, in the order of the latents.
    """
    base = base.to(next(model.parameters()).device)
    with _evaluation_mode(model):
        return [_strip(model, base, latent, each, max_codes) for latent, each in enumerate(positions)]


@torch.no_grad()
def draw(model: Method, count: int, *, seed: int = 0) -> Tensor:
    """Images float32 [count, 3, H, W] on the CPU, made of latents drawn from their prior.

    Args:
        model: a generative method.
        seed: of the draw; torch's global generator is not used.
    """
    with _evaluation_mode(model):
        return model.decoder(_drawn(model, count, seed)).sigmoid().cpu()


@torch.no_grad()
def draw_codes(model: Method, count: int, *, seed: int = 0) -> Tensor:
    """Codes [count, D] on the CPU of latents drawn from their prior; those of the images that `draw` makes.

    Args:
        model: a generative method.
        seed: as for `draw`.
    """
    return model.latent.encode(_drawn(model, count, seed)).cpu()


def _drawn(model: Method, count: int, seed: int) -> Tensor:
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    return model.latent.sample(count, generator)


def _infomec_scores(scores: InfoMEC) -> dict[str, float]:
    return {"infom": scores.infom, "infoc": scores.infoc, "infoe": scores.infoe}


def _strip(model: Method, base: Tensor, latent: int, positions: Tensor, max_codes: int) -> TraversalStrip:
    positions = positions.to(base)
    base_rank = int((positions - base[latent]).abs().argmin())
    ranks = spread(len(positions), max_codes, base_rank)
    codes = positions[torch.as_tensor(ranks, device=base.device)]
    base_position = int(np.flatnonzero(ranks == base_rank)[0])
    codes[base_position] = base[latent]
    moved = base.repeat(len(codes), 1)
    moved[:, latent] = codes
    return TraversalStrip(
        images=model.decode(moved).cpu(),
        codes=codes.cpu().numpy(),
        values=model.latent.labels(latent, codes),
        base=base_position,
    )


def spread(length: int, count: int, kept: int) -> np.ndarray:
    """At most `count` even ranks of 0..length - 1, ascending; the one nearest to `kept` becomes it."""
    if length <= count:
        return np.arange(length)
    ranks = np.linspace(0, length - 1, count).round().astype(np.int64)
    ranks[np.abs(ranks - kept).argmin()] = kept
    return ranks


def _evenly_spaced(index: Tensor, count: int) -> Tensor:
    count = min(count, len(index))
    return index[torch.linspace(0, len(index) - 1, count).round().long()]


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
