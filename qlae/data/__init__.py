"""Data sets by name, any folder of images, and the split that keeps some images out of training.

A new data set is one file here, with a class that derives from `ConvertedDataset` (or from `Dataset`, with a `load`
like the others), and one line in `DATASETS`.
"""

from pathlib import Path

import torch

from qlae.data.base import Dataset, Factor
from qlae.data.cars3d import Cars3D
from qlae.data.dsprites import DSprites
from qlae.data.falcor3d import Falcor3D
from qlae.data.image_folder import ImageFolder
from qlae.data.isaac3d import Isaac3D
from qlae.data.mpi3d import MPI3DComplex, MPI3DReal, MPI3DRealistic, MPI3DToy
from qlae.data.rooms3d import Rooms3D
from qlae.data.shapes3d import Shapes3D
from qlae.data.smallnorb import SmallNORB
from qlae.data.splits import SPLITS, held_out_split, reference_split
from qlae.errors import UserError

__all__ = ["DATASETS", "SPLITS", "Dataset", "Factor", "held_out_split", "load_dataset", "reference_split"]

DATASETS: dict[str, type[Dataset]] = {
    "rooms3d": Rooms3D,
    "shapes3d": Shapes3D,
    "mpi3d_toy": MPI3DToy,
    "mpi3d_realistic": MPI3DRealistic,
    "mpi3d_real": MPI3DReal,
    "mpi3d_complex": MPI3DComplex,
    "falcor3d": Falcor3D,
    "isaac3d": Isaac3D,
    "dsprites": DSprites,
    "cars3d": Cars3D,
    "smallnorb": SmallNORB,
}


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
