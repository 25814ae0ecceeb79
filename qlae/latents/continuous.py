"""Latents that are the encoder's numbers themselves."""

import numpy as np
import torch
from torch import Tensor

from qlae.latents.base import Latent, SampledLatent

# a traversal's steps from the rare small values to the rare large ones, as many as the paper's codes
QUANTILES = 10
LOWEST_QUANTILE = 0.01


class ContinuousLatent(Latent):
    """The features are the latents, the codes and the values; no loss term."""

    spacing = "quantiles from 1 % to 99 %"

    def __init__(self, num_latents: int) -> None:
        super().__init__()
        self.num_latents = self.features = self.width = num_latents

    def forward(self, features: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return features, {}

    def encode(self, features: Tensor) -> Tensor:
        return features

    def decode(self, codes: Tensor) -> Tensor:
        return codes

    def positions(self, codes: Tensor) -> list[Tensor]:
        """Evenly spread quantiles of each latent's values, from 1 % to 99 %."""
        levels = torch.linspace(LOWEST_QUANTILE, 1.0 - LOWEST_QUANTILE, QUANTILES, dtype=codes.dtype)
        return list(codes.quantile(levels.to(codes.device), dim=0).unbind(dim=1))

    def labels(self, latent: int, codes: Tensor) -> np.ndarray:
        """The values, float64."""
        return codes.double().cpu().numpy()

    def describe(self) -> str:
        return f"{self.num_latents} continuous latents"


class NonnegativeLatent(ContinuousLatent):
    """Latents under the constraints of a biological neuron's activity (Whittington et al., ICLR 2023).

    Loss terms, as the reference implementation of arXiv 2305.18378 has them:
        nonnegativity = nonnegativity_weight * mean(max(-z, 0))
        activity = activity_weight * mean(z^2)
    """

    def __init__(self, num_latents: int, *, nonnegativity_weight: float, activity_weight: float) -> None:
        super().__init__(num_latents)
        self.nonnegativity_weight = nonnegativity_weight
        self.activity_weight = activity_weight

    def forward(self, features: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return features, {
            "nonnegativity": self.nonnegativity_weight * (-features).relu().mean(),
            "activity": self.activity_weight * features.square().mean(),
        }


class UniformLatent(ContinuousLatent, SampledLatent):
    """Continuous latents of a GAN, whose prior is uniform from 0 to 1; the encoder's numbers are not bounded."""

    spacing = "evenly spaced over the prior"
    range: Tensor

    def __init__(self, num_latents: int) -> None:
        super().__init__(num_latents)
        self.register_buffer("range", torch.tensor([0.0, 1.0]), persistent=False)

    def sample(self, images: int, generator: torch.Generator | None = None) -> Tensor:
        low, high = self.range
        like = {"dtype": low.dtype, "device": low.device}
        return low + (high - low) * torch.rand(images, self.num_latents, generator=generator, **like)

    def positions(self, codes: Tensor) -> list[Tensor]:
        """Evenly spaced values of the prior's range, both ends included, the same for each latent."""
        low, high = self.range.tolist()
        return [torch.linspace(low, high, QUANTILES, dtype=codes.dtype, device=codes.device)] * self.num_latents
