"""Encoders and decoders by name. A new one is a file with a `build` function and a line in `NETWORKS`."""

from collections.abc import Callable

from torch import nn

from qlae.errors import UserError
from qlae.networks import compact, paper, small
from qlae.networks.base import Encoder

Build = Callable[[tuple[int, int, int], int, int], tuple[Encoder, nn.Module]]

NETWORKS: dict[str, Build] = {
    "compact": compact.build,
    "compact-gan": compact.build_for_gan,
    "paper": paper.build,
    "small": small.build,
}


def build_network(
    name: str, *, image_shape: tuple[int, int, int], features: int, width: int
) -> tuple[Encoder, nn.Module]:
    """A newly initialised encoder and decoder; the values come from torch's global generator.

    Args:
        name: a key of `NETWORKS`.
        image_shape: (3, height, width) in pixels.
        features: F, numbers that the encoder returns for each image.
        width: W, numbers that the decoder takes for each image.

    Returns:
        encoder: float32 [B, 3, H, W] in [0, 1] -> [B, F].
        decoder: float32 [B, W] -> logits [B, 3, H, W].

    Raises:
        UserError: for an unknown name, and for an image size that the network does not take.
    """
    if name not in NETWORKS:
        raise UserError(f"unknown network {name!r}: choose one of {', '.join(NETWORKS)}")
    return NETWORKS[name](image_shape, features, width)
