"""From a run's configuration and checkpoint to its data set and its trained method."""

import torch

from qlae.checkpoint import check_data, load_weights
from qlae.config import DEVICES, TrainConfig
from qlae.data import Dataset, load_dataset
from qlae.errors import UserError
from qlae.methods import Method, build_method
from qlae.run_folder import RunFolder


def load_model(run: RunFolder, config: TrainConfig, device: torch.device) -> tuple[Dataset, Method]:
    """A run's data set and its method with the weights of the last checkpoint, on `device`.

    Raises:
        UserError: for missing or changed data, and for a missing, damaged or other checkpoint.
    """
    dataset = load_dataset(config.data, resolution=config.resolution, root=config.root, device=device)
    # the values drawn here are replaced, so the caller's random numbers stay as they are
    with torch.random.fork_rng(devices=[]):
        method = build_method(config, dataset.image_shape)
    check_data(run.checkpoint, dataset.fingerprint())
    load_weights(run.checkpoint, method, config)
    return dataset, method.to(device)


def choose_device(name: str) -> torch.device:
    """The device for `auto`, `cpu` or `cuda`.

    Raises:
        UserError: for another name, and for `cuda` where torch finds no GPU.
    """
    if name not in DEVICES:
        raise UserError(f"unknown device {name!r}: choose one of {', '.join(DEVICES)}")
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise UserError("--device cuda: torch finds no GPU here; take --device cpu or auto")
    return torch.device("cuda" if name != "cpu" and available else "cpu")
