"""Data sets by name, any folder of images, and the split that keeps some images out of training.

A new data set is one file here, with a class that derives from `Dataset` and has a `load` like the others,
and one line in `DATASETS`.
"""

from pathlib import Path

import torch
from torch import Tensor

from qlae.data.base import Dataset, Factor
from qlae.data.image_folder import ImageFolder
from qlae.data.rooms3d import Rooms3D
from qlae.data.shapes3d import Shapes3D
from qlae.errors import UserError

__all__ = ["DATASETS", "Dataset", "Factor", "held_out_split", "load_dataset"]

DATASETS = {
    "rooms3d": Rooms3D,
    "shapes3d": Shapes3D,
}

EVALUATION_IMAGES = 10_000
SPLIT_SEED = 20230530


def load_dataset(
    name_or_folder: str,
    *,
    resolution: int | None = None,
    root: str | Path | None = None,
    device: torch.device | str = "cpu",
) -> Dataset:
    """The data set called `name_or_folder`, or the images in the folder of that path.

    A name wins over a folder of the same name; write `./rooms3d` for the folder.

    Args:
        resolution: height and width in pixels; None takes the set's own.
        root: where downloaded files lie; None takes the variable QLAE_DATA, else the folder `data`.
        device: where `images` and `sources` are returned.

    Raises:
        UserError: unknown name, missing or wrong files, or a resolution that the set does not have.
    """
    if name_or_folder in DATASETS:
        return DATASETS[name_or_folder].load(resolution=resolution, root=root, device=device)
    folder = Path(name_or_folder)
    if folder.is_dir():
        return ImageFolder.load(folder, resolution=resolution, device=device)
    names = ", ".join(sorted(DATASETS))
    raise UserError(f"no data set or folder '{name_or_folder}': give one of {names}, or a folder of images")


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
