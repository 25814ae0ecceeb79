"""Encoders and decoders by name. A new one is a file with a `build` function and a line in `NETWORKS`."""

from collections.abc import Callable

from torch import nn

from qlae.errors import UserError
from qlae.networks import compact, paper, small

Build = Callable[[tuple[int, int, int], int], tuple[nn.Module, nn.Module]]

NETWORKS: dict[str, Build] = {
    "compact": compact.build,
    "paper": paper.build,
    "small": small.build,
}


def build_network(name: str, *, image_shape: tuple[int, int, int], num_latents: int) -> tuple[nn.Module, nn.Module]:
    """A newly initialised encoder and decoder; the values come from torch's global generator.

    Args:
        name: a key of `NETWORKS`.
        image_shape: (3, height, width) in pixels.
        num_latents: D, what the encoder returns and the decoder takes for each image.

    Returns:
        encoder: float32 [B, 3, H, W] in [0, 1] -> [B, D].
        decoder: float32 [B, D] -> logits [B, 3, H, W].

    Raises:
        UserError: for an unknown name, and for an image size that the network does not take.
    """
    if name not in NETWORKS:
        raise UserError(f"unknown network {name!r}: choose one of {', '.join(NETWORKS)}")
    return NETWORKS[name](image_shape, num_latents)
