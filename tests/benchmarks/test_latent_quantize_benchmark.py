"""The command that records the speed of `latent_quantize`, on tiny sizes; no figure is looked at."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
COMMAND = BENCHMARKS / "latent_quantize.py"
FLOORS = ["trivial op", "trivial pair", "three copies"]


def record(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, COMMAND, "--quick", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("record") / "quick"
    done = record("--contenders", "fused", "eager", "--output", folder)
    assert done.returncode == 0, done.stderr
    return folder


def header_cells(table: str, heading: str) -> list[str]:
    section = table.split(f"## {heading}", 1)[1]
    line = next(line for line in section.splitlines() if line.startswith("|"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_table_has_its_columns(folder):
    table = (folder / "table.md").read_text()
    ratios = [column for floor in FLOORS for column in (floor, f"fused / {floor}")]
    work = ["N x D x K", "dtype", "direction"]
    assert header_cells(table, "Against the floors") == ["N x D x K", "fused", *ratios]
    assert header_cells(table, "Times") == [*work, "fused", "eager", *FLOORS]
    assert header_cells(table, "How many times as long") == [*work, "eager", *FLOORS]
    assert header_cells(table, "Bytes") == [*work, "bytes", "fused, GB/s", "copies, GB/s", "percent of the copies"]
    assert "its figures mean nothing" in table


def test_results_name_machine_versions_and_every_row(folder):
    results = json.loads((folder / "results.json").read_text())
    assert results["machine"]["threads"] == 1
    assert results["machine"]["device"] and results["machine"]["instruction_set"]
    assert results["versions"]["torch"] == torch.__version__
    assert {row["direction"] for row in results["rows"]} == {"forward", "backward", "forward + backward"}
    assert {row["case"]["dtype"] for row in results["rows"]} == {"float32", "bfloat16"}
    for row in results["rows"]:
        assert list(row["contenders"]) == ["fused", "eager", *FLOORS]
        assert row["contenders"]["fused"]["fused_over_this"] == 1
        # 16 x 3 x 10 forward in float32: z, quantized and int32 indices of 48 elements.
        if row["direction"] == "forward":
            assert row["bytes"] == 48 * 12
    assert (folder / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_existing_folder_is_left_alone(folder):
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    done = record("--output", folder)
    assert done.returncode == 2
    assert (
        done.stderr.strip()
        .splitlines()[-1]
        .endswith("exists and is not overwritten; name another folder with --output")
    )
    assert before == {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_unknown_contender_is_named(tmp_path):
    done = record("--contenders", "fused", "numpy", "--output", tmp_path / "new")
    assert done.returncode == 2
    assert "numpy" in done.stderr
    assert not (tmp_path / "new").exists()
