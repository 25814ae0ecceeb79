"""The reference implementation's small variant: a third of the paper's layers, each with stride 2."""

from torch import nn

from qlae.networks.base import Encoder
from qlae.networks.convolutional import (
    ConvolutionalEncoder,
    Convolutions,
    StyledDecoder,
    check_image_size,
)

WIDTHS = (64, 128, 256, 512)
KERNELS = (4,) * 4
STRIDES = (2,) * 4
DENSE_WIDTHS = (512,)


def build(image_shape: tuple[int, int, int], features: int, width: int) -> tuple[Encoder, nn.Module]:
    """Four convolutions and four styled transposed ones."""
    check_image_size("small", image_shape)
    encoder = ConvolutionalEncoder(image_shape, features, Convolutions(WIDTHS, KERNELS, STRIDES), DENSE_WIDTHS)
    decoder = StyledDecoder(image_shape, width, Convolutions(WIDTHS[::-1], KERNELS, STRIDES), DENSE_WIDTHS)
    return encoder, decoder
