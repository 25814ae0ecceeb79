import shutil
from dataclasses import replace
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from qlae import checkpoint
from qlae.checkpoint import STATE, WEIGHTS, load_training_state, load_weights, save_checkpoint
from qlae.config import TrainConfig
from qlae.errors import UserError

CONFIG = TrainConfig(levels=10, num_latents=3)


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Linear(3, 2)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    save_checkpoint(folder, model(), CONFIG, {"step": 5, "values": [1.5, None], "tensor": torch.arange(3)})
    return folder


def test_what_was_saved_comes_back(saved: Path) -> None:
    other = model(seed=1)
    load_weights(saved, other, CONFIG)
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), model().parameters(), strict=True))
    state = load_training_state(saved)
    assert state["step"] == 5 and state["values"] == [1.5, None]
    assert torch.equal(state["tensor"], torch.arange(3))


def test_the_weights_are_plain_safetensors(saved: Path) -> None:
    weights = load_file(saved / WEIGHTS)
    assert torch.equal(weights["weight"], model().weight)


def test_saving_replaces_and_leaves_nothing_else(saved: Path) -> None:
    save_checkpoint(saved, model(seed=2), CONFIG, {"step": 6})
    assert load_training_state(saved)["step"] == 6
    assert [path.name for path in saved.parent.iterdir()] == ["checkpoint"]
    assert {path.name for path in saved.iterdir()} == {WEIGHTS, STATE}


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed: No space left")]
)
def test_a_failure_while_writing_keeps_the_last_checkpoint(
    saved: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def full(*_: object) -> None:
        raise error

    monkeypatch.setattr(checkpoint.torch, "save", full)
    with pytest.raises(UserError, match=r"cannot write the checkpoint .*No space left.*unharmed"):
        save_checkpoint(saved, model(seed=2), CONFIG, {"step": 6})
    monkeypatch.undo()
    assert load_training_state(saved)["step"] == 5
    load_weights(saved, model(), CONFIG)
    save_checkpoint(saved, model(), CONFIG, {"step": 7})
    assert load_training_state(saved)["step"] == 7


def test_a_crash_between_the_renames_keeps_the_last_checkpoint(saved: Path) -> None:
    saved.rename(saved.with_name("checkpoint.previous"))
    assert load_training_state(saved)["step"] == 5
    save_checkpoint(saved, model(), CONFIG, {"step": 6})
    assert load_training_state(saved)["step"] == 6
    assert [path.name for path in saved.parent.iterdir()] == ["checkpoint"]


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no checkpoint"):
        load_weights(tmp_path / "checkpoint", model(), CONFIG)


@pytest.mark.parametrize("name", [WEIGHTS, STATE])
@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "a flipped byte", "other content"])
def test_a_damaged_file_is_named(saved: Path, name: str, damage: str) -> None:
    file = saved / name
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "a flipped byte":
        # the first: of the header's length, or of the archive's magic number
        file.write_bytes(bytes([content[0] ^ 0xFF]) + content[1:])
    elif damage == "truncated":
        file.write_bytes(content[: len(content) // 2])
    else:
        file.write_bytes(b"something else entirely")
    with pytest.raises(UserError, match=name) as caught:
        load_weights(saved, model(), CONFIG)
        load_training_state(saved)
    assert "\n" not in str(caught.value)


def test_another_configuration_is_refused(saved: Path) -> None:
    with pytest.raises(UserError, match=r"trained with levels 10, and the run's config\.yaml says 12"):
        load_weights(saved, model(), replace(CONFIG, levels=12))
    load_weights(saved, model(), replace(CONFIG, steps=1, device="cpu"))


def test_weights_of_another_shape_are_refused(saved: Path) -> None:
    with pytest.raises(UserError, match="does not fit the model") as caught:
        load_weights(saved, nn.Linear(4, 2), CONFIG)
    assert "\n" not in str(caught.value)


def test_foreign_safetensors_are_refused(saved: Path) -> None:
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(1)}, saved / WEIGHTS)
    with pytest.raises(UserError, match="does not say how it was trained"):
        load_weights(saved, model(), CONFIG)


def test_non_contiguous_weights_are_saved(tmp_path: Path) -> None:
    layer = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    save_checkpoint(tmp_path / "checkpoint", layer, CONFIG, {"step": 0})
    other = nn.Conv2d(3, 4, 3)
    load_weights(tmp_path / "checkpoint", other, CONFIG)
    assert torch.equal(layer.weight, other.weight)
    shutil.rmtree(tmp_path / "checkpoint")


def test_a_zip_that_torch_did_not_write(saved: Path) -> None:
    with ZipFile(saved / STATE, "w") as file:
        file.writestr("anything", "else")
    with pytest.raises(UserError, match="holds no training state"):
        load_training_state(saved)
