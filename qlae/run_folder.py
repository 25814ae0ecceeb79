"""The folder that holds all of one training run."""

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import yaml

from qlae.config import TrainConfig, from_plain, to_yaml
from qlae.errors import StorageError, UserError

Number = int | float


@dataclass(frozen=True)
class RunFolder:
    """Names of what lies in a run's folder, and how each is written and read.

    A text file is written beside its place and then renamed, so that a reader never sees a part of it.
    """

    path: Path

    @classmethod
    def create(cls, path: Path, config: TrainConfig) -> Self:
        """Makes the folder and writes the configuration into it.

        Raises:
            UserError: if something is there already (an empty folder is taken).
            StorageError: if it cannot be written.
        """
        refuse_existing(path)
        run = cls(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            run.write_config(config)
        except OSError as error:
            raise StorageError(
                f"cannot write the run folder {path} ({error.strerror}): give another --output"
            ) from error
        return run

    @classmethod
    def open(cls, path: Path) -> tuple[Self, TrainConfig]:
        """The run and its configuration.

        Raises:
            UserError: if there is no such folder, or its configuration is missing, unreadable or wrong.
        """
        run = cls(path)
        if not path.is_dir():
            raise UserError(f"there is no run folder {path}: give the folder that `qlae train` wrote")
        if not run.config_file.is_file():
            raise UserError(f"{path} is not a run folder, it has no config.yaml: give one that `qlae train` wrote")
        try:
            values = yaml.safe_load(run.config_file.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{run.config_file} is not YAML ({reason}): correct it") from error
        return run, from_plain(values, run.config_file)

    @property
    def config_file(self) -> Path:
        """The configuration, YAML."""
        return self.path / "config.yaml"

    @property
    def metrics_file(self) -> Path:
        """Losses about a hundred times a run, and scores at each evaluation, one row a step, CSV."""
        return self.path / "metrics.csv"

    @property
    def summary_file(self) -> Path:
        """The last scores, JSON."""
        return self.path / "summary.json"

    @property
    def checkpoint(self) -> Path:
        """Folder of the last checkpoint."""
        return self.path / "checkpoint"

    @property
    def figures(self) -> Path:
        """Folder of the pictures."""
        return self.path / "figures"

    @property
    def events(self) -> Path:
        """Folder of TensorBoard's events."""
        return self.path / "tensorboard"

    def write_config(self, config: TrainConfig) -> None:
        """Replaces config.yaml."""
        write_text(self.config_file, to_yaml(config))

    def write_metrics(self, rows: Sequence[Mapping[str, Number]]) -> None:
        """Replaces metrics.csv; numbers are written so that they read back to the bit, what a row lacks as nothing."""
        text = io.StringIO()
        if rows:
            # a value that comes every few steps may be missing from the first rows
            names = dict.fromkeys(name for row in rows for name in row)
            writer = csv.DictWriter(text, fieldnames=list(names), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        write_text(self.metrics_file, text.getvalue())

    def write_summary(self, summary: Mapping[str, object]) -> None:
        """Replaces summary.json."""
        write_text(self.summary_file, json.dumps(summary, indent=2, allow_nan=False) + "\n")


def refuse_existing(path: Path) -> None:
    """Raises UserError if something other than an empty folder is at `path`."""
    if path.is_dir() and not any(path.iterdir()):
        return
    if path.exists() or path.is_symlink():
        raise UserError(
            f"{path} is there already and is not overwritten: go on with it by --resume {path}, "
            "or give another --output"
        )


def write_text(path: Path, text: str) -> None:
    """Writes a whole file or nothing."""
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
