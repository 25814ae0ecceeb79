import pytest
import torch
from torch import nn
from torch.nn import functional

from qlae.errors import UserError
from qlae.networks import NETWORKS, build_network
from qlae.networks.convolutional import LEAK, NORM_EPS, StyledBlock


def parameter_count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("num_latents", [1, 12])
def test_shapes(name: str, num_latents: int) -> None:
    encoder, decoder = build_network(name, image_shape=(3, 64, 64), features=num_latents, width=num_latents)
    latents = encoder(torch.rand(2, 3, 64, 64))
    assert latents.shape == (2, num_latents)
    assert decoder(latents).shape == (2, 3, 64, 64)


@pytest.mark.parametrize("name", ["paper", "small"])
def test_other_sizes_that_the_strides_allow(name: str) -> None:
    encoder, decoder = build_network(name, image_shape=(3, 32, 48), features=4, width=4)
    assert decoder(encoder(torch.rand(2, 3, 32, 48))).shape == (2, 3, 32, 48)


def test_the_encoder_for_gans_tells_dark_images_from_bright_ones() -> None:
    image = torch.rand(1, 3, 16, 16) + 0.1

    def relative_change(name: str) -> float:
        torch.manual_seed(0)
        encoder, _ = build_network(name, image_shape=(3, 16, 16), features=4, width=4)
        bright, dark = encoder(image), encoder(0.5 * image)
        return ((bright - dark).norm() / bright.norm()).item()

    assert relative_change("compact") < 1e-3
    assert relative_change("compact-gan") > 0.05


@pytest.mark.parametrize("name", ["compact", "compact-gan"])
def test_compact_takes_any_size(name: str) -> None:
    encoder, decoder = build_network(name, image_shape=(3, 8, 5), features=4, width=4)
    assert decoder(encoder(torch.rand(2, 3, 8, 5))).shape == (2, 3, 8, 5)


@pytest.mark.parametrize("name", ["paper", "small"])
@pytest.mark.parametrize("size", [16, 40, 63])
def test_a_size_that_cannot_be_taken_is_named(name: str, size: int) -> None:
    with pytest.raises(UserError, match=rf"{name}.*multiples of 16 from 32.*{size} x {size}"):
        build_network(name, image_shape=(3, size, size), features=4, width=4)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"'huge'.*compact, compact-gan, paper, small"):
        build_network("huge", image_shape=(3, 64, 64), features=4, width=4)


def test_paper_has_the_published_layers() -> None:
    encoder, decoder = build_network("paper", image_shape=(3, 64, 64), features=12, width=12)
    widths = [32, 32, 32, 64, 64, 64, 128, 128, 128, 256, 256, 256]
    kernels = [3, 3, 4] * 4
    convolution_weights = sum(
        kernel**2 * before * after for kernel, before, after in zip(kernels, [3, *widths[:-1]], widths, strict=True)
    )
    norms = 2 * sum(widths)
    dense = (256 * 4 * 4 + 1) * 256 + (256 + 1) * 256
    assert parameter_count(encoder) == convolution_weights + norms + dense + (256 + 1) * 12

    widths = widths[::-1]
    convolution_weights = sum(
        kernel**2 * before * after for kernel, before, after in zip(kernels, [256, *widths[:-1]], widths, strict=True)
    )
    modulations = sum((256 + 1) * 2 * width for width in widths)
    dense = (12 + 1) * 256 + (256 + 1) * 256
    constant, head = 256 * 4 * 4, 32 * 3 * 3 * 3
    assert parameter_count(decoder) == convolution_weights + modulations + dense + constant + head


def test_paper_sizes_inside() -> None:
    encoder, decoder = build_network("paper", image_shape=(3, 64, 64), features=12, width=12)
    strides = [layer.stride[0] for layer in encoder.convolutions if isinstance(layer, nn.Conv2d)]
    assert strides == [1, 1, 2] * 4
    assert [block.convolution.stride[0] for block in decoder.blocks] == [1, 1, 2] * 4
    assert encoder.convolutions(torch.rand(1, 3, 64, 64)).shape == (1, 256, 4, 4)
    assert torch.equal(decoder.constant, torch.full((256, 4, 4), 0.1))


def test_small_has_four_layers_each_way() -> None:
    encoder, decoder = build_network("small", image_shape=(3, 64, 64), features=12, width=12)
    layers = [layer for layer in encoder.convolutions if isinstance(layer, nn.Conv2d)]
    assert [layer.out_channels for layer in layers] == [64, 128, 256, 512]
    assert [block.convolution.out_channels for block in decoder.blocks] == [512, 256, 128, 64]
    assert {(layer.kernel_size, layer.stride) for layer in layers} == {((4, 4), (2, 2))}
    assert decoder.constant.shape == (512, 4, 4)


def test_encoder_block_is_convolution_norm_leak() -> None:
    encoder, _ = build_network("small", image_shape=(3, 32, 32), features=4, width=4)
    convolution, norm = encoder.convolutions[0], encoder.convolutions[1]
    norm.weight.data.uniform_()
    norm.bias.data.uniform_()
    images = torch.rand(2, 3, 32, 32)
    maps = functional.conv2d(images, convolution.weight, stride=2, padding=1)
    centred = maps - maps.mean(dim=(2, 3), keepdim=True)
    scaled = centred / (centred.square().mean(dim=(2, 3), keepdim=True) + NORM_EPS).sqrt()
    affine = scaled * norm.weight[:, None, None] + norm.bias[:, None, None]
    expected = torch.where(affine > 0, affine, LEAK * affine)
    # a few float32 roundings of numbers of size one, after a norm that divides by a deviation near 0.1
    torch.testing.assert_close(encoder.convolutions[:3](images), expected, rtol=1e-4, atol=1e-5)


def test_styled_block_is_convolution_leak_norm_modulation() -> None:
    torch.manual_seed(0)
    block = StyledBlock(5, 7, kernel=4, stride=2, style_width=6)
    maps, style = torch.randn(2, 5, 4, 4), torch.randn(2, 6)
    result = functional.conv_transpose2d(maps, block.convolution.weight, stride=2, padding=1)
    result = torch.where(result > 0, result, LEAK * result)
    result = result - result.mean(dim=(2, 3), keepdim=True)
    result = result / (result.square().mean(dim=(2, 3), keepdim=True) + NORM_EPS).sqrt()
    modulation = (style @ block.modulation.weight.T + block.modulation.bias).clamp(min=0.0)
    scale, shift = modulation[:, :7, None, None], modulation[:, 7:, None, None]
    torch.testing.assert_close(block(maps, style), result * scale + shift, rtol=1e-4, atol=1e-5)
    assert block.convolution.bias is None
    # the reference draws from the fan of the input channels
    assert block.convolution.weight.abs().max() <= (5 * 4 * 4) ** -0.5


@pytest.mark.parametrize("name", NETWORKS)
def test_every_parameter_learns(name: str) -> None:
    torch.manual_seed(0)
    encoder, decoder = build_network(name, image_shape=(3, 32, 32), features=4, width=4)
    decoder(encoder(torch.rand(4, 3, 32, 32))).square().sum().backward()
    for module in (encoder, decoder):
        for parameter_name, parameter in module.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, parameter_name
