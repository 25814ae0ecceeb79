"""The paper's encoder and decoder (arXiv 2305.18378; layer sizes as in its reference implementation)."""

from torch import nn

from qlae.networks.base import Encoder
from qlae.networks.convolutional import (
    ConvolutionalEncoder,
    Convolutions,
    StyledDecoder,
    check_image_size,
)

WIDTHS = (32, 32, 32, 64, 64, 64, 128, 128, 128, 256, 256, 256)
KERNELS = (3, 3, 4) * 4
STRIDES = (1, 1, 2) * 4
DENSE_WIDTHS = (256, 256)


def build(image_shape: tuple[int, int, int], features: int, width: int) -> tuple[Encoder, nn.Module]:
    """Twelve convolutions and twelve styled transposed ones; made for 64 x 64 pixels."""
    check_image_size("paper", image_shape)
    encoder = ConvolutionalEncoder(image_shape, features, Convolutions(WIDTHS, KERNELS, STRIDES), DENSE_WIDTHS)
    decoder = StyledDecoder(image_shape, width, Convolutions(WIDTHS[::-1], KERNELS, STRIDES), DENSE_WIDTHS)
    return encoder, decoder
