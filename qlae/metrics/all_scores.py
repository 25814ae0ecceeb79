"""Every score of latents against sources, by name."""

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch

from qlae.metrics.beta_vae import beta_vae
from qlae.metrics.dci import dci
from qlae.metrics.factor_vae import factor_vae
from qlae.metrics.infomec import infomec
from qlae.metrics.irs import irs
from qlae.metrics.modularity_explicitness import explicitness, modularity
from qlae.metrics.mutual_information_gap import mutual_information_gap
from qlae.metrics.samples import TooFewSamplesError
from qlae.metrics.sap import sap

Value = TypeVar("Value")


def all_scores(
    latents: np.ndarray | torch.Tensor,  # [N, n_z]
    sources: np.ndarray | torch.Tensor,  # [N, n_s]
    discrete: bool = True,
    *,
    seed: int = 0,
) -> dict[str, float | None]:
    """InfoMEC and the other scores of the field, each with its defaults.

    Args:
        latents: integer codes, or with `discrete=False` real numbers.
        sources: whole numbers.
        discrete: True for codes. Scores that know numbers only take codes as such.
        seed: of everything that is drawn.

    Returns:
        infom, infoc, infoe, and what `other_scores` returns.

    Raises:
        ValueError: as `infomec`.
    """
    scores = infomec(latents, sources, discrete, seed=seed)
    mec = {"infom": scores.infom, "infoc": scores.infoc, "infoe": scores.infoe}
    return mec | other_scores(latents, sources, discrete, seed=seed)


def other_scores(
    latents: np.ndarray | torch.Tensor, sources: np.ndarray | torch.Tensor, discrete: bool = True, *, seed: int = 0
) -> dict[str, float | None]:
    """All but InfoMEC: dci_disentanglement, dci_completeness, dci_informativeness, mig, sap, factor_vae, beta_vae,
    modularity, explicitness, irs. Arguments and errors as for `all_scores`.

    Where there are too few samples to hold some out, or to share values, a score is None, and a warning says why.
    """
    trees = _value(dci, latents, sources, seed=seed)
    return {
        "dci_disentanglement": trees and trees.disentanglement,
        "dci_completeness": trees and trees.completeness,
        "dci_informativeness": trees and trees.informativeness,
        "mig": mutual_information_gap(latents, sources, discrete),
        "sap": _value(sap, latents, sources, seed=seed),
        "factor_vae": _value(factor_vae, latents, sources, seed=seed),
        "beta_vae": _value(beta_vae, latents, sources, seed=seed),
        "modularity": modularity(latents, sources, discrete),
        "explicitness": _value(explicitness, latents, sources, seed=seed),
        "irs": irs(latents, sources),
    }


def _value(score: Callable[..., Value], *arguments: Any, **options: Any) -> Value | None:
    """What `score` returns, or None with a warning where there are too few samples for it."""
    try:
        return score(*arguments, **options)
    except TooFewSamplesError as error:
        warnings.warn(f"{score.__name__} has no value: {error}", stacklevel=3)
        return None
