"""Checkpoints: the weights as safetensors, and beside them what a run needs to go on bit for bit.

A checkpoint is a folder. It is written under another name and moved into place when it is whole, so that
however the program ends there is a whole one.
"""

import json
import os
import shutil
import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from qlae.config import TrainConfig, differences, from_plain, to_plain
from qlae.errors import StorageError, UserError

WEIGHTS = "model.safetensors"
STATE = "training_state.pt"


def save_checkpoint(folder: Path, model: nn.Module, config: TrainConfig, state: dict[str, Any]) -> None:
    """Replaces the checkpoint in `folder`.

    Args:
        state: what else a run needs; tensors, numbers, strings, and dicts, lists and tuples of them.

    Raises:
        StorageError: if it cannot be written; the checkpoint before it is then still there.
    """
    new = folder.with_name(folder.name + ".new")
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    metadata = {"format": "pt", "config": json.dumps(to_plain(config)), "step": str(state.get("step", ""))}
    metadata["data"] = str(state.get("data", ""))
    try:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        save_file(weights, new / WEIGHTS, metadata=metadata)
        torch.save(state, new / STATE)
        for name in (WEIGHTS, STATE):
            _flush(new / name)
        _swap(new, folder)
    # torch reports a full disk as a RuntimeError.
    except (OSError, RuntimeError, SafetensorError) as error:
        raise StorageError(
            f"cannot write the checkpoint {folder} ({error}): make room or mend the folder; "
            "the checkpoint before it is unharmed"
        ) from error


def load_weights(folder: Path, model: nn.Module, config: TrainConfig) -> None:
    """Fills `model`, which `config` describes, with the weights of the checkpoint.

    Raises:
        UserError: if the file is missing or damaged, or was trained with another configuration.
    """
    file = _existing(folder) / WEIGHTS
    weights, metadata = _read_weights(file)
    if "config" not in metadata:
        raise UserError(f"{file} does not say how it was trained: give a checkpoint that `qlae train` wrote")
    try:
        plain = json.loads(metadata["config"])
    except json.JSONDecodeError as error:
        raise UserError(f"{file} does not say readably how it was trained ({error}): train a new run") from error
    trained = from_plain(plain, file)
    changed = differences(trained, config)
    if changed:
        name = changed[0]
        raise UserError(
            f"{file} was trained with {name} {getattr(trained, name)}, and the run's config.yaml says "
            f"{getattr(config, name)}: set config.yaml back, or train a new run"
        )
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{file} does not fit the model ({reason}): train a new run") from error


def has_checkpoint(folder: Path) -> bool:
    """Whether `folder`, or what a crash in the middle of its replacement left of it, is there."""
    return folder.is_dir() or _previous(folder).is_dir()


def check_data(folder: Path, fingerprint: str) -> None:
    """Refuses images that the checkpoint was not trained with, some of which it may take for held-out ones.

    Raises:
        UserError: if `fingerprint` is not that of the checkpoint's data, or the file is missing or damaged.
    """
    _, metadata = _read_weights(_existing(folder) / WEIGHTS)
    if metadata.get("data") != fingerprint:
        raise UserError(
            f"{folder} was trained with {metadata.get('data') or 'unknown data'}, and the data is {fingerprint} now: "
            "restore the images, or train a new run"
        )


def load_training_state(folder: Path) -> dict[str, Any]:
    """The `state` that the checkpoint was saved with, its tensors on the CPU.

    Raises:
        UserError: if the file is missing or damaged.
    """
    file = _existing(folder) / STATE
    if not file.is_file():
        raise UserError(f"{file} is missing, so the run cannot go on: restore it, or train a new run")
    if not _is_whole_zip(file):
        raise UserError(f"{file} is truncated or damaged: restore it, or train a new run")
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, UnpicklingError, KeyError) as error:
        raise UserError(f"{file} holds no training state: restore it, or train a new run") from error


def _read_weights(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not file.is_file():
        raise UserError(f"{file} is missing: restore it, or train a new run")
    try:
        with safe_open(file, framework="pt") as content:
            weights = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
            return weights, content.metadata() or {}
    except SafetensorError as error:
        raise UserError(f"{file} is truncated or damaged ({error}): restore it, or train a new run") from error


def _is_whole_zip(file: Path) -> bool:
    # what torch.save writes is a zip archive with a checksum for each of its parts
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.testzip() is None
    except zipfile.BadZipFile:
        return False


def _existing(folder: Path) -> Path:
    # a crash between the two renames of a swap leaves the last checkpoint under its other name
    for candidate in (folder, _previous(folder)):
        if candidate.is_dir():
            return candidate
    raise UserError(f"there is no checkpoint {folder}: the run ended before its first one; train a new run")


def _previous(folder: Path) -> Path:
    return folder.with_name(folder.name + ".previous")


def _swap(new: Path, folder: Path) -> None:
    previous = _previous(folder)
    if folder.exists():
        shutil.rmtree(previous, ignore_errors=True)
        os.replace(folder, previous)
    os.replace(new, folder)
    shutil.rmtree(previous, ignore_errors=True)


def _flush(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())
