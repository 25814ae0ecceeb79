"""What every kind of latent offers to training, evaluation and traversals."""

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn


class Latent(nn.Module, ABC):
    """From an encoder's features to what the decoder takes, by way of D latents.

    The codes of an image are its D latents as they are scored: integers of a discrete kind, real numbers of a
    continuous one.

    Attributes:
        num_latents: D.
        features: F, numbers that the encoder returns for each image.
        width: W, numbers that the decoder takes for each image.
        levels: number of codes of each latent, D numbers; None where latents are continuous.
        spacing: what the values are that a traversal moves a continuous latent through; None where it has codes.
    """

    num_latents: int
    features: int
    width: int
    levels: tuple[int, ...] | None = None
    spacing: ClassVar[str | None] = None

    @property
    def discrete(self) -> bool:
        """Whether codes are integers, each below its latent's number in `levels`."""
        return self.levels is not None

    @abstractmethod
    def forward(self, features: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """One training pass from features [B, F].

        Returns:
            values [B, W] for the decoder, and loss terms by name: scalars, weighted, to be added to the objective.
        """

    @abstractmethod
    def encode(self, features: Tensor) -> Tensor:
        """Codes [B, D] of features [B, F]; draws no random numbers."""

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """Values [B, W] for the decoder of codes [B, D]."""

    @abstractmethod
    def positions(self, codes: Tensor) -> list[Tensor]:
        """For each latent the codes that a traversal moves it through, in order.

        Args:
            codes: those of many images, [N, D].

        Returns:
            D tensors of the codes' dtype, each [C] with a C of its own.
        """

    @abstractmethod
    def labels(self, latent: int, codes: Tensor) -> np.ndarray:
        """What to write under a traversal's images: one number for each of `codes` [C] of a latent."""

    @abstractmethod
    def describe(self) -> str:
        """A few words for a person, beginning with the number of latents."""


class SampledLatent(Latent, ABC):
    """A latent with a prior, as the generator of a GAN needs it.

    `encode` takes values that were drawn for features, and gives the codes that they have.
    """

    @abstractmethod
    def sample(self, images: int, generator: torch.Generator | None = None) -> Tensor:
        """Values [images, W] drawn from the prior, on the latent's device; differentiable in what is learned."""
