"""The convolutional encoder and decoder that `paper` and `small` configure."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional

from qlae.errors import UserError
from qlae.networks.base import Encoder

# four layers of stride 2
REDUCTION = 16
NORM_EPS = 1e-6
LEAK = 0.2


@dataclass(frozen=True)
class Convolutions:
    """A stack of convolutions, the layers in order; all are padded by 1."""

    widths: Sequence[int]
    kernels: Sequence[int]
    strides: Sequence[int]


def check_image_size(network: str, image_shape: tuple[int, int, int]) -> None:
    """Raises UserError unless both sides are multiples of 16 from 32 pixels up.

    At 16 pixels the last maps would be single pixels, which an instance norm turns into zeros.
    """
    _, height, width = image_shape
    if any(side % REDUCTION or side < 2 * REDUCTION for side in (height, width)):
        raise UserError(
            f"the network {network!r} takes images whose sides are multiples of 16 from 32 pixels up, "
            f"not {height} x {width}: give --resolution 32 or 64, or take --network compact"
        )


class ConvolutionalEncoder(Encoder):
    """[B, 3, H, W] -> [B, F]: convolutions, each with instance norm and leaky ReLU, then dense layers.

    Without the norms (`normalized`) the convolutions have biases in their place.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        features: int,
        convolutions: Convolutions,
        dense_widths: Sequence[int],
        *,
        normalized: bool = True,
    ) -> None:
        super().__init__()
        channels, height, width = image_shape
        layers: list[nn.Module] = []
        for out_channels, kernel, stride in zip(
            convolutions.widths, convolutions.kernels, convolutions.strides, strict=True
        ):
            layers.append(nn.Conv2d(channels, out_channels, kernel, stride, padding=1, bias=not normalized))
            if normalized:
                layers.append(nn.InstanceNorm2d(out_channels, eps=NORM_EPS, affine=True))
            layers.append(nn.LeakyReLU(LEAK))
            channels = out_channels
        self.convolutions = nn.Sequential(*layers)
        reduction = prod(convolutions.strides)
        map_size = channels * (height // reduction) * (width // reduction)
        self.dense = dense_layers(map_size, dense_widths)
        self.trunk_width = dense_widths[-1]
        self.head = nn.Linear(self.trunk_width, features)

    def trunk(self, images: Tensor) -> Tensor:
        return self.dense(self.convolutions(images).flatten(1))


class StyledBlock(nn.Module):
    """Transposed convolution, leaky ReLU, instance norm, then a scale and a shift of each channel.

    Scale and shift are a linear map of the style followed by a ReLU, so neither is negative.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int, style_width: int) -> None:
        super().__init__()
        self.convolution = nn.ConvTranspose2d(in_channels, out_channels, kernel, stride, padding=1, bias=False)
        # torch takes the fan from the output channels here; the reference takes the input's
        bound = (in_channels * kernel * kernel) ** -0.5
        nn.init.uniform_(self.convolution.weight, -bound, bound)
        self.modulation = nn.Linear(style_width, 2 * out_channels)

    def forward(self, maps: Tensor, style: Tensor) -> Tensor:
        maps = functional.leaky_relu(self.convolution(maps), LEAK)
        maps = functional.instance_norm(maps, eps=NORM_EPS)
        scale, shift = self.modulation(style).relu()[:, :, None, None].chunk(2, dim=1)
        return torch.addcmul(shift, maps, scale)


class StyledDecoder(nn.Module):
    """[B, W] -> logits [B, 3, H, W]: blocks turn a learned constant into an image, styled by the latents."""

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        latent_width: int,
        convolutions: Convolutions,
        dense_widths: Sequence[int],
    ) -> None:
        super().__init__()
        image_channels, height, width = image_shape
        channels = convolutions.widths[0]
        reduction = prod(convolutions.strides)
        self.dense = dense_layers(latent_width, dense_widths)
        self.constant = nn.Parameter(torch.full((channels, height // reduction, width // reduction), 0.1))
        blocks = []
        for out_channels, kernel, stride in zip(
            convolutions.widths, convolutions.kernels, convolutions.strides, strict=True
        ):
            blocks.append(StyledBlock(channels, out_channels, kernel, stride, dense_widths[-1]))
            channels = out_channels
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Conv2d(channels, image_channels, kernel_size=3, padding=1, bias=False)

    def forward(self, values: Tensor) -> Tensor:
        style = self.dense(values)
        maps = self.constant.expand(len(values), -1, -1, -1)
        for block in self.blocks:
            maps = block(maps, style)
        return self.head(maps)


def dense_layers(in_features: int, widths: Sequence[int]) -> nn.Sequential:
    """Linear layers of the given widths, a ReLU after each."""
    layers: list[nn.Module] = []
    for width in widths:
        layers += [nn.Linear(in_features, width), nn.ReLU()]
        in_features = width
    return nn.Sequential(*layers)
