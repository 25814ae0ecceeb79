"""What every encoder offers; a decoder is any module from [B, W] to logits [B, 3, H, W]."""

from abc import ABC, abstractmethod

from torch import Tensor, nn


class Encoder(nn.Module, ABC):
    """A trunk, and a linear head on its features; a GAN's critic is a second head on the same trunk.

    Attributes:
        trunk_width: T, the number of the trunk's features.
        head: [B, T] -> [B, F].
    """

    trunk_width: int
    head: nn.Linear

    @abstractmethod
    def trunk(self, images: Tensor) -> Tensor:
        """Features [B, T] of images float32 [B, 3, H, W] in [0, 1]."""

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.trunk(images))
