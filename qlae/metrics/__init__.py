"""Scores of representations and reconstructions."""

from qlae.metrics.code_usage import code_counts, perplexity
from qlae.metrics.image_metrics import PSNR_CAP, psnr, psnr_per_image
from qlae.metrics.infomec import InfoMEC, active_latents, infomec

__all__ = ["PSNR_CAP", "InfoMEC", "active_latents", "code_counts", "infomec", "perplexity", "psnr", "psnr_per_image"]
