"""What a comparison consists of: named rows, data sets and seeds, from a YAML file."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from qlae.config import TrainConfig, from_plain, to_plain
from qlae.data import DATASETS
from qlae.errors import UserError
from qlae.presets import preset

PRESETS = ("quick", "paper", "ablations")

KEYS = ("preset", "options", "data", "seeds", "rows")
# what the grid or the command line decides for a cell, so that no row can
RESERVED = {
    "data": "list data sets under 'data'",
    "seed": "list seeds under 'seeds'",
    "device": "give --device",
    "root": "give --root",
}
PER_DATA = "per_data"


@dataclass(frozen=True)
class Cell:
    """One training run of the grid.

    Attributes:
        data: the data set's name, or the last part of a folder's.
        row: the row's label.
        config: the run's configuration; `num_latents` and `resolution` may be left to the data set.
    """

    data: str
    row: str
    config: TrainConfig

    @property
    def name(self) -> str:
        """Where the cell lies among the cells: DATA/ROW/seedN in characters that every file system takes."""
        return f"{slug(self.data)}/{slug(self.row)}/seed{self.config.seed}"


@dataclass(frozen=True)
class Grid:
    """All combinations of rows, data sets and seeds.

    Attributes:
        cells: in the order in which they are trained, the first seed of everything first.
    """

    data: tuple[str, ...]
    rows: tuple[str, ...]
    seeds: tuple[int, ...]
    cells: tuple[Cell, ...]

    def of(self, data: str, row: str) -> list[Cell]:
        """The cells of one row on one data set, in the order of the seeds."""
        return [cell for cell in self.cells if (cell.data, cell.row) == (data, row)]


@dataclass(frozen=True)
class Choice:
    """What the command line says in place of the file; None leaves it to the file.

    Attributes:
        rows: labels of the rows to keep, in this order.
        data: data sets by name or folder; one that the file does not name has no options of its own.
    """

    rows: Sequence[str] | None = None
    data: Sequence[str] | None = None
    seeds: Sequence[int] | None = None
    steps: int | None = None
    device: str = "auto"
    root: Path | None = None


def load_grid(name_or_file: str, choice: Choice | None = None) -> Grid:
    """The grid of a preset or of a YAML file; docs/compare.md describes the format.

    Raises:
        UserError: for an unknown preset, a file that is missing or not YAML, and whatever in it no run can have.
    """
    return _build(_source(name_or_file), choice or Choice())


def load_whole_grid(name_or_file: str, choice: Choice) -> Grid:
    """The grid of which `choice` is a part: all rows of the file, and its data sets and seeds with the chosen ones
    that it does not name after them.

    Raises:
        UserError: as `load_grid`.
    """
    source = _source(name_or_file)
    data = [*_data_options(source), *(choice.data or ())]
    seeds = [*_seeds(source, Choice()), *(choice.seeds or ())]
    # a data set is known by its label, and a chosen folder stands for the file's of the same label
    by_label = {_label(name): name for name in data}
    return _build(source, replace(choice, rows=None, data=list(by_label.values()), seeds=list(dict.fromkeys(seeds))))


def slug(label: str) -> str:
    """`label` in small letters, digits, dots and hyphens."""
    return re.sub(r"[^a-z0-9.]+", "-", label.lower()).strip("-.")


def _source(name_or_file: str) -> "_Source":
    origin, text = _read(name_or_file)
    try:
        content = yaml.load(text, _UniqueKeys)
    except yaml.YAMLError as error:
        raise UserError(f"{origin} is not YAML ({' '.join(str(error).split())}): correct it") from error
    return _Source(origin, content)


def _read(name_or_file: str) -> tuple[str, str]:
    if name_or_file in PRESETS:
        file = resources.files("qlae.compare") / "presets" / f"{name_or_file}.yaml"
        return f"preset {name_or_file}", file.read_text(encoding="utf-8")
    path = Path(name_or_file)
    if not path.is_file():
        raise UserError(f"no comparison '{name_or_file}': give one of {', '.join(PRESETS)}, or a YAML file")
    try:
        return str(path), path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text ({error}): give a YAML file") from error


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which a key given twice is an error; by itself PyYAML drops the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} stands twice", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


# YAML 1.2 reads 1e-3 as a number, which PyYAML takes for text
_UniqueKeys.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


class _Source:
    """A file's content with checks that name the place at fault."""

    def __init__(self, origin: str, content: object) -> None:
        self.origin = origin
        self.content = self.mapping(content, "the file")
        for key in self.content:
            if key not in KEYS:
                raise self.error(f"unknown key {key!r}: take {', '.join(KEYS)}")
        if "rows" not in self.content:
            raise self.error("'rows' is missing: name at least one, such as QLAE: {}")

    def error(self, what: str) -> UserError:
        return UserError(f"{self.origin}: {what}")

    def mapping(self, value: object, place: str) -> dict[str, Any]:
        if value is None:
            return {}
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise self.error(f"{place} should have one 'name: value' a line, and names that YAML reads as text")
        return value

    def options(self, value: object, place: str) -> dict[str, Any]:
        options = self.mapping(value, place)
        for name in options:
            if name in RESERVED:
                raise self.error(f"{place} sets {name!r}: {RESERVED[name]} in place of it")
        return options


def _build(source: _Source, choice: Choice) -> Grid:
    data_options = _data_options(source)
    rows = _rows(source, choice)
    data = _labels(source, list(data_options) if choice.data is None else list(choice.data))
    seeds = _seeds(source, choice)
    configs = {
        (label, row): _config(source, choice, name, row, (data_options.get(name, {}), *_row_layers(source, row, name)))
        for label, name in data.items()
        for row in rows
    }
    cells = [Cell(*key, replace(config, seed=seed)) for seed in seeds for key, config in configs.items()]
    return Grid(tuple(data), tuple(rows), tuple(seeds), tuple(cells))


def _config(
    source: _Source, choice: Choice, data: str, row: str, layers: Sequence[Mapping[str, object]]
) -> TrainConfig:
    """The preset's values, replaced by those of the whole grid, then of each layer, then of the command line."""
    options = dict(source.options(source.content.get("options"), "options"))
    for layer in layers:
        options |= layer
    method = str(options.get("method", TrainConfig.method))
    values = to_plain(preset(str(source.content.get("preset", "default")), method, data)) | options
    values |= {"data": _resolved(data), "device": choice.device}
    if choice.steps is not None:
        values["steps"] = choice.steps
    config = from_plain(values, f"{source.origin}, row {row!r}")
    return replace(config, root=choice.root and choice.root.resolve())


def _rows(source: _Source, choice: Choice) -> list[str]:
    """Labels of the rows to run."""
    rows = source.mapping(source.content["rows"], "rows")
    if not rows:
        raise source.error("'rows' is empty: name at least one, such as QLAE: {}")
    _require_distinct(source, "rows", list(rows))
    if choice.rows is None:
        return list(rows)
    unknown = [row for row in choice.rows if row not in rows]
    if unknown:
        known = ", ".join(f"'{row}'" for row in rows)
        raise UserError(f"--rows {unknown[0]!r}: {source.origin} has the rows {known}")
    if len(set(choice.rows)) < len(choice.rows):
        raise UserError(f"--rows {' '.join(choice.rows)}: name each row once")
    return list(choice.rows)


def _data_options(source: _Source) -> dict[str, dict[str, Any]]:
    data = source.content.get("data", ["rooms3d"])
    if isinstance(data, list):
        data = dict.fromkeys(data)
    data = source.mapping(data, "data")
    return {name: source.options(options, f"data {name!r}") for name, options in data.items()}


def _labels(source: _Source, names: Sequence[str]) -> dict[str, str]:
    """Data sets by what they are called in the table."""
    if not names:
        raise source.error("'data' is empty: name at least one data set")
    labels = [_label(name) for name in names]
    _require_distinct(source, "data", labels)
    return dict(zip(labels, names, strict=True))


def _label(name: str) -> str:
    return Path(name).resolve().name if _is_folder(name) else name


def _require_distinct(source: _Source, place: str, labels: Sequence[str]) -> None:
    folders: dict[str, str] = {}
    for label in labels:
        folder = slug(label)
        if not folder:
            raise source.error(f"{place}: {label!r} has no letter or digit: rename it")
        if folder in folders:
            raise source.error(f"{place}: {folders[folder]!r} and {label!r} would share a folder: rename one")
        folders[folder] = label


def _seeds(source: _Source, choice: Choice) -> list[int]:
    seeds = source.content.get("seeds", [0, 1, 2]) if choice.seeds is None else list(choice.seeds)
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise source.error(f"the seeds are {seeds}, which should be a list of whole numbers from 0")
    if len(set(seeds)) < len(seeds):
        raise source.error(f"the seeds are {seeds}, which should differ")
    return seeds


def _row_layers(source: _Source, row: str, data: str) -> tuple[dict[str, object], dict[str, object]]:
    """The row's options for all data sets, and those for this one."""
    place = f"row {row!r}"
    options = dict(source.mapping(source.content["rows"][row], place))
    per_data = source.mapping(options.pop(PER_DATA, None), f"{place}, {PER_DATA!r}")
    known = _data_options(source)
    for name in per_data:
        if name not in known:
            raise source.error(f"{place}, {PER_DATA!r} names {name!r}, which is not under 'data'")
    return source.options(options, place), source.options(per_data.get(data), f"{place}, {data!r}")


def _is_folder(name: str) -> bool:
    return name not in DATASETS and Path(name).is_dir()


def _resolved(name: str) -> str:
    # as a run's own configuration has a folder of images
    return str(Path(name).resolve()) if _is_folder(name) else name
