"""Separated attribute predictability (SAP): how far the best latent predicts a source better than the second."""

import numpy as np
import torch
from sklearn.svm import LinearSVC

from qlae.metrics.fitting import fit, warn_unless_converged
from qlae.metrics.mutual_information import standardise
from qlae.metrics.samples import check_lengths, relabel, sources_of, split, values_of


def sap(
    latents: np.ndarray | torch.Tensor,  # [N, n_z]
    sources: np.ndarray | torch.Tensor,  # [N, n_s]
    *,
    continuous_sources: bool = False,
    held_out: float = 1 / 3,
    seed: int = 0,
) -> float:
    """Mean over the varying sources of the best minus the second best score of a single latent, in [0, 1].

    A latent's score for a source is the accuracy, on samples held out, of a linear support vector machine (C =
    0.01, balanced classes, one against the rest) from that latent alone, standardised; with `continuous_sources` the
    square of their correlation, on all samples.

    Source: Kumar et al., "Variational Inference of Disentangled Latent Concepts from Unlabeled Observations" (ICLR
    2018, openreview H1kG7GZAW), section 3, with the classifier of Locatello et al. 2019 (disentanglement_lib), who
    fit 10,000 samples and score 5,000: the default share. Unlike there, latents are standardised first: this machine
    also penalises its intercept, so that the score of latents as they are depends on their place and scale (perfect
    codes of 4, 3 and 2 values: 0.44 from 0 on, 0.00 from 10 on). A constant latent scores the accuracy of a constant
    guess, or 0 correlation; a single latent has a constant for a second. Without a varying source 0. A machine that
    does not converge is reported by scikit-learn's ConvergenceWarning.

    Args:
        latents: real numbers or codes.
        sources: whole numbers.
        continuous_sources: take the sources' values as numbers, not classes.
        held_out: share of each class that is scored and not fitted.
        seed: of the split and of the classifier.

    Raises:
        ValueError: as `infomec`; for a share that leaves nothing to score.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out must be a share in (0, 1), got {held_out}")
    values, numbers = values_of(latents), sources_of(sources)
    labels, sizes = relabel(numbers)
    check_lengths(values, labels, score="sap")
    # A constant latent stands in for the second one where there is but one.
    values = values if values.shape[1] > 1 else np.insert(values, 1, 0.0, axis=1)
    values = standardise(values)
    gaps, converged = [], []
    for source in np.flatnonzero(sizes > 1):
        if continuous_sources:
            scores = _squared_correlations(values, numbers[:, source].astype(np.float64))
        else:
            scores, done = _accuracies(values, labels[:, source], held_out, seed)
            converged += done
        second, first = np.sort(scores)[-2:]
        gaps.append(first - second)
    warn_unless_converged("sap", converged)
    return float(np.mean(gaps)) if gaps else 0.0


def _accuracies(values: np.ndarray, labels: np.ndarray, held_out: float, seed: int) -> tuple[np.ndarray, list[bool]]:
    """Held-out accuracy from each latent alone, float64 [n_z], and whether each machine converged."""
    fitted, scored = split(labels, held_out, seed)
    accuracies, converged = np.empty(values.shape[1]), []
    for latent in range(values.shape[1]):
        column = values[:, latent : latent + 1]
        classifier = LinearSVC(C=0.01, class_weight="balanced", random_state=seed)
        converged.append(fit(classifier, column[fitted], labels[fitted]))
        accuracies[latent] = classifier.score(column[scored], labels[scored])
    return accuracies, converged


def _squared_correlations(values: np.ndarray, source: np.ndarray) -> np.ndarray:
    centred, target = values - values.mean(axis=0), source - source.mean()
    scale = (centred**2).sum(axis=0) * (target**2).sum()
    return (target @ centred) ** 2 / np.where(scale > 0, scale, 1.0)
