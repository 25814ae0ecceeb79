"""The compact network: the layers it has and what its decoder computes."""

import pytest
import torch
from torch import nn

from qlae.networks.compact import MASKS, PaintingDecoder, build


@pytest.mark.parametrize(
    ("size", "widths"),
    [((3, 3), []), ((7, 64), []), ((8, 8), [16]), ((16, 16), [16, 32]), ((33, 50), [16, 32, 64])],
)
def test_convolutions_halve_down_to_small_maps(size: tuple[int, int], widths: list[int]) -> None:
    encoder, decoder = build((3, *size), 5, 5)
    found = [layer.out_channels for layer in encoder.modules() if isinstance(layer, nn.Conv2d)]
    assert found == widths
    assert decoder(encoder(torch.rand(2, 3, *size))).shape == (2, 3, *size)


def test_logits_are_masks_times_colours() -> None:
    decoder = PaintingDecoder((3, 2, 4), 5).double()
    nn.init.normal_(decoder.bias)
    latents = torch.randn(6, 5, dtype=torch.float64)
    features = decoder.dense(latents)
    masks = torch.sigmoid(decoder.masks(features)).view(6, MASKS, 2, 4)
    colours = decoder.colours(features).view(6, 3, MASKS)
    expected = torch.einsum("bcm,bmhw->bchw", colours, masks) + decoder.bias.view(3, 2, 4)
    # 8 float64 products of values near 1 are summed
    assert torch.allclose(decoder(latents), expected, atol=1e-13, rtol=0)


def test_pixel_bias_is_free_of_weight_decay_by_its_name() -> None:
    assert "bias" in dict(PaintingDecoder((3, 2, 4), 5).named_parameters())
