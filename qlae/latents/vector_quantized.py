"""Vectors quantized to a shared codebook (van den Oord et al., NeurIPS 2017)."""

import math

import numpy as np
import torch
from torch import Tensor, nn

from qlae.latents.base import Latent

EMBEDDING_SIZE = 64


class VectorQuantizedLatent(Latent):
    """Each latent is a vector that becomes the nearest of `num_codes` learned ones.

    The encoder returns D * 64 numbers, which are D vectors of 64. All D latents share one codebook [num_codes, 64],
    as in the reference implementation of arXiv 2305.18378; a latent's code is the number of its vector there. The
    decoder takes the D chosen vectors one after the other. Gradients pass straight through to the encoder.

    Loss terms, with means over all B * D * 64 elements:
        quantization = quantization_weight * mean((sg(z) - code)^2)
        commitment = commitment_weight * mean((z - sg(code))^2)
    """

    def __init__(
        self, num_latents: int, num_codes: int, *, quantization_weight: float, commitment_weight: float
    ) -> None:
        super().__init__()
        self.num_latents = num_latents
        self.features = self.width = num_latents * EMBEDDING_SIZE
        self.levels = (num_codes,) * num_latents
        self.quantization_weight = quantization_weight
        self.commitment_weight = commitment_weight
        # uniform with the variance 1/64, as the reference draws it
        bound = math.sqrt(3.0 / EMBEDDING_SIZE)
        self.codebook = nn.Parameter(torch.empty(num_codes, EMBEDDING_SIZE).uniform_(-bound, bound))

    def forward(self, features: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        values = self.decode(self.encode(features))
        terms = {
            "quantization": self.quantization_weight * (values - features.detach()).square().mean(),
            "commitment": self.commitment_weight * (features - values.detach()).square().mean(),
        }
        # exactly the code: features + (values - features) would round away from it
        return values.detach() + (features - features.detach()), terms

    @torch.no_grad()
    def encode(self, features: Tensor) -> Tensor:
        vectors = features.unflatten(1, (self.num_latents, EMBEDDING_SIZE))
        # |z|^2 is the same for all codes
        distances = self.codebook.square().sum(dim=1) - 2.0 * vectors @ self.codebook.T
        return distances.argmin(dim=2)

    def decode(self, codes: Tensor) -> Tensor:
        return self.codebook[codes.long()].flatten(1)

    def positions(self, codes: Tensor) -> list[Tensor]:
        """The codes that each latent takes; there is no other order between them than their numbers."""
        return [column.unique() for column in codes.unbind(dim=1)]

    def labels(self, latent: int, codes: Tensor) -> np.ndarray:
        """The codes themselves, int64."""
        return codes.long().cpu().numpy()

    def describe(self) -> str:
        return f"{self.num_latents} latents, vectors of {EMBEDDING_SIZE} from one codebook of {self.levels[0]}"
