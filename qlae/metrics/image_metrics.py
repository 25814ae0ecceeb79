"""Peak signal-to-noise ratio of images in [0, 1]."""

import numpy as np
import torch

# Identical images would score infinity, which no mean and no JSON file can hold. 100 dB is far past what
# 8-bit images tell apart: rounding to 8 bits alone gives 59 dB.
PSNR_CAP = 100.0

# A sum of rounded products, such as a rendered pixel, may pass 1 by a few float32 ulps.
_ROUNDING = 1e-6


def psnr_per_image(
    images: np.ndarray | torch.Tensor,  # [B, ...]
    reconstructions: np.ndarray | torch.Tensor,  # [B, ...]
) -> torch.Tensor:  # [B]
    """Peak signal-to-noise ratio of each image, -10 log10(mean squared error), in dB.

    Args:
        images: floats in [0, 1], [B, ...]; the mean of an image runs over all dimensions but the first.
        reconstructions: the same shape, floats in [0, 1].

    Returns:
        float64 [B] on the device of `images`; at most `PSNR_CAP`, which identical images get.

    Raises:
        ValueError: for shapes that differ or hold no pixel, and for values that are not floats in [0, 1].
    """
    images = _unit_interval(images, "images")
    reconstructions = _unit_interval(reconstructions, "reconstructions")
    if images.shape != reconstructions.shape:
        raise ValueError(
            f"images and reconstructions must have the same shape, "
            f"got {list(images.shape)} and {list(reconstructions.shape)}"
        )
    squared_error = (images.double() - reconstructions.double()).square().flatten(1).mean(dim=1)
    return -10.0 * squared_error.clamp(min=10.0 ** (-PSNR_CAP / 10.0)).log10()


def psnr(
    images: np.ndarray | torch.Tensor,  # [B, ...]
    reconstructions: np.ndarray | torch.Tensor,  # [B, ...]
) -> float:
    """Mean over images of `psnr_per_image`, in dB: a mean of ratios, not the ratio of the mean error."""
    return float(psnr_per_image(images, reconstructions).mean())


def _unit_interval(values: np.ndarray | torch.Tensor, name: str) -> torch.Tensor:
    tensor = torch.as_tensor(values).detach()
    if tensor.ndim < 2 or tensor.numel() == 0:
        raise ValueError(f"{name} must have shape [B, ...] with at least one image, got {list(tensor.shape)}")
    if not tensor.is_floating_point():
        raise ValueError(f"{name} must be floats in [0, 1], got {tensor.dtype}: divide 8-bit images by 255")
    low, high = (float(extreme) for extreme in tensor.aminmax())
    # A NaN fails this comparison too.
    if not (low >= -_ROUNDING and high <= 1.0 + _ROUNDING):
        raise ValueError(f"{name} must be in [0, 1], got values from {low:g} to {high:g}")
    return tensor
