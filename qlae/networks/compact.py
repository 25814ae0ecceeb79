"""A network for small images on a CPU, for any image size.

The encoder is a short stack of convolutions. The decoder paints: an image's logits are a sum of soft masks,
each in one colour. How a thing looks is the product of where it is and what colour it has; a decoder of dense
layers has to approximate that product, and its latents then mix the two.
"""

import torch
from torch import Tensor, nn

from qlae.networks.base import Encoder
from qlae.networks.convolutional import ConvolutionalEncoder, Convolutions, dense_layers

FIRST_WIDTH = 16
DENSE_WIDTH = 128
MASKS = 8
# the convolutions halve the image while its shorter side stays at least this long
SMALLEST_MAP = 4


class PaintingDecoder(nn.Module):
    """[B, W] -> logits [B, 3, H, W]: masks in (0, 1) and colours from dense layers, multiplied and summed."""

    def __init__(self, image_shape: tuple[int, int, int], latent_width: int) -> None:
        super().__init__()
        channels, height, width = image_shape
        self.image_shape = image_shape
        self.dense = dense_layers(latent_width, (DENSE_WIDTH, DENSE_WIDTH))
        self.masks = nn.Linear(DENSE_WIDTH, MASKS * height * width)
        self.colours = nn.Linear(DENSE_WIDTH, channels * MASKS)
        self.bias = nn.Parameter(torch.zeros(channels, height * width))

    def forward(self, values: Tensor) -> Tensor:
        features = self.dense(values)
        masks = self.masks(features).sigmoid().unflatten(1, (MASKS, -1))
        colours = self.colours(features).unflatten(1, (-1, MASKS))
        return (colours @ masks + self.bias).view(-1, *self.image_shape)


def build(image_shape: tuple[int, int, int], features: int, width: int) -> tuple[Encoder, nn.Module]:
    """Convolutions of doubling width, each halving the image, and a dense layer; the painting decoder."""
    return _build(image_shape, features, width, normalized=True)


def build_for_gan(image_shape: tuple[int, int, int], features: int, width: int) -> tuple[Encoder, nn.Module]:
    """The same without norms in the encoder: with them a critic on its trunk cannot tell dark images from bright ones.

    A convolution without bias and an instance norm after it give the same for an image and for a multiple of it.
    """
    return _build(image_shape, features, width, normalized=False)


def _build(
    image_shape: tuple[int, int, int], features: int, width: int, *, normalized: bool
) -> tuple[Encoder, nn.Module]:
    shorter = min(image_shape[1:])
    widths: list[int] = []
    while shorter >= 2 * SMALLEST_MAP:
        widths.append(FIRST_WIDTH * 2 ** len(widths))
        shorter //= 2
    convolutions = Convolutions(widths=widths, kernels=[4] * len(widths), strides=[2] * len(widths))
    encoder = ConvolutionalEncoder(image_shape, features, convolutions, (DENSE_WIDTH,), normalized=normalized)
    return encoder, PaintingDecoder(image_shape, width)
