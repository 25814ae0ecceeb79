import csv
import json
import math
from pathlib import Path

import pytest

from qlae.config import TrainConfig
from qlae.errors import UserError
from qlae.run_folder import RunFolder


def test_create_then_open(tmp_path: Path) -> None:
    config = TrainConfig(levels=7, num_latents=3)
    run = RunFolder.create(tmp_path / "deep" / "run", config)
    assert RunFolder.open(run.path) == (run, config)


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    assert RunFolder.create(tmp_path, TrainConfig()).config_file.is_file()


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_what_is_there_is_not_overwritten(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "run"
    if kind == "folder":
        path.mkdir()
        (path / "notes.txt").write_text("mine")
    elif kind == "file":
        path.write_text("mine")
    else:
        path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"run is there already.*--resume.*--output"):
        RunFolder.create(path, TrainConfig())
    assert not (path / "config.yaml").exists()


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write the run folder .*file/run.*--output"):
        RunFolder.create(tmp_path / "file" / "run", TrainConfig())


def test_open_names_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no run folder"):
        RunFolder.open(tmp_path / "none")
    with pytest.raises(UserError, match=r"not a run folder, it has no config\.yaml"):
        RunFolder.open(tmp_path)


@pytest.mark.parametrize("content", [b"levels: [1", b"\xff\xfe\x00"])
def test_a_damaged_configuration_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(UserError, match=r"config\.yaml is not YAML") as caught:
        RunFolder.open(tmp_path)
    assert "\n" not in str(caught.value)


def test_metrics_read_back_to_the_bit(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, TrainConfig())
    rows = [{"step": 1, "psnr": math.pi}, {"step": 2, "psnr": 1e-300}]
    run.write_metrics(rows)
    with run.metrics_file.open() as file:
        read = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    assert read == rows
    run.write_metrics(rows[:1])
    assert len(run.metrics_file.read_text().splitlines()) == 2


def test_nothing_but_the_files_is_left(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, TrainConfig())
    run.write_metrics([])
    run.write_summary({"psnr": 1.5, "infom": None})
    assert json.loads(run.summary_file.read_text()) == {"psnr": 1.5, "infom": None}
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", "metrics.csv", "summary.json"}
