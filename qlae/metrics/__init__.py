"""Scores of representations and reconstructions."""

from qlae.metrics.accumulator import ScoreAccumulator
from qlae.metrics.all_scores import all_scores, other_scores
from qlae.metrics.beta_vae import beta_vae
from qlae.metrics.code_usage import code_counts, perplexity
from qlae.metrics.dci import DCI, dci
from qlae.metrics.factor_vae import factor_vae
from qlae.metrics.image_metrics import PSNR_CAP, psnr, psnr_per_image
from qlae.metrics.infomec import InfoMEC, active_latents, infomec
from qlae.metrics.irs import irs
from qlae.metrics.modularity_explicitness import explicitness, modularity
from qlae.metrics.mutual_information_gap import mutual_information_gap
from qlae.metrics.sap import sap

__all__ = [
    "DCI",
    "PSNR_CAP",
    "InfoMEC",
    "ScoreAccumulator",
    "active_latents",
    "all_scores",
    "beta_vae",
    "code_counts",
    "dci",
    "explicitness",
    "factor_vae",
    "infomec",
    "irs",
    "modularity",
    "mutual_information_gap",
    "other_scores",
    "perplexity",
    "psnr",
    "psnr_per_image",
    "sap",
]
