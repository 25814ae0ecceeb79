import math

import numpy as np
import pytest
import torch

from qlae.metrics import PSNR_CAP, psnr, psnr_per_image


def test_hand_computed() -> None:
    images = torch.zeros(2, 3, 4, 4)
    reconstructions = torch.stack([torch.full((3, 4, 4), 0.1), torch.full((3, 4, 4), 0.5)])
    # Errors of 0.01 and 0.25; 0.1 in float32 is off by 1e-8 relative.
    expected = [20.0, -10 * math.log10(0.25)]
    assert psnr_per_image(images, reconstructions).tolist() == pytest.approx(expected, abs=1e-6)
    assert psnr(images, reconstructions) == pytest.approx(sum(expected) / 2, abs=1e-6)


def test_mean_of_ratios_is_not_ratio_of_mean() -> None:
    images = np.zeros((2, 1, 2, 2))
    reconstructions = np.stack([np.full((1, 2, 2), 1.0), np.full((1, 2, 2), 0.01)])
    assert psnr(images, reconstructions) == pytest.approx(20.0)


def test_identical_images_get_the_cap() -> None:
    images = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert psnr_per_image(images, images).tolist() == pytest.approx([PSNR_CAP] * 3)


def test_numpy_and_torch_agree() -> None:
    generator = torch.Generator().manual_seed(0)
    images, reconstructions = torch.rand(2, 3, 3, 4, 4, generator=generator)
    assert psnr(images.numpy(), reconstructions.numpy()) == psnr(images, reconstructions)
    assert psnr_per_image(images, reconstructions).dtype == torch.float64


def test_rounding_past_one_is_taken() -> None:
    images = torch.full((1, 3, 2, 2), 1.0 + 2**-23)
    assert psnr(images, images) == pytest.approx(PSNR_CAP)


ZEROS = torch.zeros(2, 3, 4, 4)


@pytest.mark.parametrize(
    ("images", "reconstructions", "message"),
    [
        (ZEROS, ZEROS[:1], r"same shape, got \[2, 3, 4, 4\] and \[1, 3, 4, 4\]"),
        (ZEROS[:0], ZEROS[:0], "at least one image"),
        (ZEROS[0, 0, 0], ZEROS[0, 0, 0], r"images must have shape \[B, ...\]"),
        (ZEROS.byte(), ZEROS, "images must be floats in .*got torch.uint8"),
        (ZEROS, ZEROS + 1.5, r"reconstructions must be in \[0, 1\], got values from 1.5 to 1.5"),
        (ZEROS - 0.1, ZEROS, r"images must be in \[0, 1\]"),
        (ZEROS, ZEROS * torch.nan, r"reconstructions must be in \[0, 1\], got values from nan to nan"),
    ],
)
def test_wrong_input_is_named(images: torch.Tensor, reconstructions: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        psnr(images, reconstructions)
