"""Which images are trained on and which are scored."""

from collections.abc import Callable

import torch
from torch import Tensor

from qlae.errors import UserError

EVALUATION_IMAGES = 10_000
SPLIT_SEED = 20230530

Split = Callable[[int], tuple[Tensor, Tensor]]


def held_out_split(length: int) -> tuple[Tensor, Tensor]:
    """Indices to train on and to evaluate on: int64, sorted, disjoint, together 0 to length - 1.

    A tenth of the images, at most 10,000 and at least one, is kept for evaluation. The choice is the
    beginning of a fixed permutation; the training seed has no part in it, so that all runs are scored on the
    same images.

    Raises:
        UserError: fewer than two images.
    """
    if length < 2:
        raise UserError(f"{length} image(s) cannot be split: give at least 2, one to train on and one to evaluate")
    count = max(1, min(EVALUATION_IMAGES, length // 10))
    order = torch.randperm(length, generator=torch.Generator().manual_seed(SPLIT_SEED))
    return order[count:].sort().values, order[:count].sort().values


def reference_split(length: int) -> tuple[Tensor, Tensor]:
    """As the publication's code does it: all images are trained on, those that are scored among them.

    Its 10,000 images are the first ones in the order of TensorFlow Datasets' files, which is not reproduced here; the
    scored images are those of `held_out_split`.
    """
    _, evaluation = held_out_split(length)
    return torch.arange(length), evaluation


SPLITS: dict[str, Split] = {"held-out": held_out_split, "reference": reference_split}
