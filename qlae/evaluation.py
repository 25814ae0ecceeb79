"""Scores of a trained model on images that it was not trained on, and what its figures show."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from qlae.data import Dataset
from qlae.methods.base import Method
from qlae.metrics import InfoMEC, code_counts, infomec, perplexity, psnr_per_image

EXAMPLES = 16
MAX_STRIP_CODES = 16


@dataclass(frozen=True)
class Evaluation:
    """What a model with D latents does on N images.

    Attributes:
        infomec: scores of the code indices against the data's factors; None where the data has no factors.
        psnr: mean over the images of each one's peak signal-to-noise ratio, in dB.
        usage: for each latent how often each of its codes was taken, D arrays int64 [levels of the latent].
        perplexity: effective number of codes, float64 [D].
        active: bool [D], latents that take more than one code.
        inputs: E images of the N, evenly spread over them, float32 [E, 3, H, W] in [0, 1] on the CPU.
        reconstructions: what the model makes of `inputs`, the same shape.
        indices: codes of `inputs`, int64 [E, D] on the CPU.
    """

    infomec: InfoMEC | None
    psnr: float
    usage: list[np.ndarray]
    perplexity: np.ndarray
    active: np.ndarray
    inputs: Tensor
    reconstructions: Tensor
    indices: Tensor

    def row(self) -> dict[str, float]:
        """Numbers by name, for a table: infom, infoc, infoe (with factors), psnr, active, mean_perplexity."""
        scores = {} if self.infomec is None else _infomec_scores(self.infomec)
        return scores | {
            "psnr": self.psnr,
            "active": int(self.active.sum()),
            "mean_perplexity": float(self.perplexity.mean()),
        }

    def summary(self) -> dict[str, object]:
        """Scores for JSON: InfoMEC's are None without factors; perplexity has one number a latent."""
        scores = {"infom": None, "infoc": None, "infoe": None, "infoe_converged": None}
        if self.infomec is not None:
            scores = _infomec_scores(self.infomec) | {"infoe_converged": self.infomec.converged}
        return scores | {
            "psnr": self.psnr,
            "active": int(self.active.sum()),
            "num_latents": len(self.active),
            "perplexity": self.perplexity.tolist(),
            "evaluation_images": int(self.usage[0].sum()),
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
    """One latent moved through its own codes, all others kept, in the order of the codes' values.

    Attributes:
        images: float32 [C, 3, H, W] in [0, 1] on the CPU.
        codes: the latent's code in each image, int64 [C].
        values: the codes' values, ascending, float64 [C].
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
    all_indices, ratios = [], []
    with _evaluation_mode(model):
        for batch in index.split(batch_size):
            images = dataset.images(batch)
            indices, reconstructions = model.encode_and_reconstruct(images)
            all_indices.append(indices.cpu())
            ratios.append(psnr_per_image(images, reconstructions).cpu())
        inputs = dataset.images(_evenly_spaced(index, EXAMPLES))
        example_indices, reconstructions = model.encode_and_reconstruct(inputs)
    indices = torch.cat(all_indices)
    usage = code_counts(indices, model.quantizer.levels)
    sources = torch.cat([dataset.sources(batch).cpu() for batch in index.split(batch_size)])
    return Evaluation(
        infomec=infomec(indices, sources) if dataset.factors else None,
        psnr=float(torch.cat(ratios).mean()),
        usage=usage,
        perplexity=perplexity(indices, model.quantizer.levels),
        active=np.array([np.count_nonzero(counts) > 1 for counts in usage]),
        inputs=inputs.cpu(),
        reconstructions=reconstructions.cpu(),
        indices=example_indices.cpu().long(),
    )


@torch.no_grad()
def traverse(model: Method, indices: Tensor, *, max_codes: int = MAX_STRIP_CODES) -> list[TraversalStrip]:
    """One strip for each latent, starting from the image that `indices` stands for.

    Args:
        indices: codes of the base image, integers [D].
        max_codes: of a latent with more codes, this many evenly spread ones are shown, the base's among them.

    Returns:
        D strips, in the order of the latents.
    """
    device = next(model.parameters()).device
    base = indices.to(device).long()
    values = code_values(model)
    with _evaluation_mode(model):
        return [_strip(model, base, latent, values[latent], max_codes) for latent in range(len(base))]


@torch.no_grad()
def code_values(model: Method) -> list[np.ndarray]:
    """Values of each latent's codes by their indices, D arrays float64 [levels of the latent]."""
    levels = model.quantizer.levels
    device = next(model.parameters()).device
    last = torch.tensor(levels, device=device) - 1
    # Latents with fewer codes than the longest one repeat their last.
    indices = torch.arange(max(levels), device=device)[:, None].minimum(last)
    values = model.quantizer.decode(indices).double().cpu().numpy()
    return [values[:size, latent] for latent, size in enumerate(levels)]


def _infomec_scores(scores: InfoMEC) -> dict[str, float]:
    return {"infom": scores.infom, "infoc": scores.infoc, "infoe": scores.infoe}


def _strip(model: Method, base: Tensor, latent: int, values: np.ndarray, max_codes: int) -> TraversalStrip:
    order = np.argsort(values, kind="stable")
    base_rank = int(np.flatnonzero(order == int(base[latent]))[0])
    ranks = spread(len(values), max_codes, base_rank)
    codes = order[ranks]
    indices = base.repeat(len(codes), 1)
    indices[:, latent] = torch.as_tensor(codes, device=base.device)
    return TraversalStrip(
        images=model.decode_indices(indices).cpu(),
        codes=codes,
        values=values[codes],
        base=int(np.flatnonzero(ranks == base_rank)[0]),
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
