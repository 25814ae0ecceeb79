from dataclasses import replace
from pathlib import Path

import pytest

from qlae.compare.cells import GridFolder
from qlae.compare.grid import Cell, Grid
from qlae.config import TrainConfig


@pytest.fixture
def folder(tmp_path: Path) -> GridFolder:
    return GridFolder(tmp_path / "comparison")


@pytest.fixture
def grid(tiny_config: TrainConfig) -> Grid:
    """Two rows and two seeds on the tiny data set, a moment each."""
    rows = {"QLAE": replace(tiny_config, levels=10), "five": replace(tiny_config, levels=5)}
    cells = [Cell("tiny", row, replace(config, seed=seed)) for seed in (0, 1) for row, config in rows.items()]
    return Grid(("tiny",), tuple(rows), (0, 1), tuple(cells))
