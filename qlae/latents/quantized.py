"""Latents quantized one by one to scalar codes (arXiv 2305.18378, section 3), by the fused kernels."""

import numpy as np
import torch
from torch import Tensor

from qlae.latents.base import SampledLatent
from qlae_kernels import FusedLatentQuantizer


class QuantizedLatent(SampledLatent):
    """Each latent becomes the nearest value of its codebook: its own or a global one, learned or fixed.

    The loss term `quantization` is the quantizer's own, quantization and commitment in one. The prior is uniform
    over each latent's codes.
    """

    def __init__(self, quantizer: FusedLatentQuantizer) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.num_latents = self.features = self.width = quantizer.num_latents
        self.levels = quantizer.levels

    def forward(self, features: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        quantized, _, loss = self.quantizer(features)
        return quantized, {"quantization": loss}

    def encode(self, features: Tensor) -> Tensor:
        return self.quantizer.encode(features)

    def decode(self, codes: Tensor) -> Tensor:
        return self.quantizer.decode(codes)

    def sample(self, images: int, generator: torch.Generator | None = None) -> Tensor:
        return self.quantizer.sample(images, generator)

    def positions(self, codes: Tensor) -> list[Tensor]:
        """All codes of each latent, from the smallest value to the largest."""
        values = [self._values(latent) for latent in range(self.num_latents)]
        return [row.argsort(stable=True).to(codes) for row in values]

    def labels(self, latent: int, codes: Tensor) -> np.ndarray:
        """The codes' values, float64."""
        return self._values(latent)[codes.to(self.quantizer.codebook.device)].double().cpu().numpy()

    def describe(self) -> str:
        levels = sorted(set(self.levels))
        codes = f"{levels[0]}" if len(levels) == 1 else f"{levels[0]} to {levels[-1]}"
        kind = f"{'learned' if self.quantizer.learnable else 'fixed'} codes"
        shared = ", one codebook for all" if self.quantizer.shared_codebook else ""
        return f"{self.num_latents} latents of {codes} {kind}{shared}"

    def _values(self, latent: int) -> Tensor:
        row = 0 if self.quantizer.shared_codebook else latent
        return self.quantizer.codebook[row, : self.levels[latent]].detach()
