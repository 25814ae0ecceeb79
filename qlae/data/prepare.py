"""Getting a data set ready by name, and the list of all."""

from math import prod
from pathlib import Path
from textwrap import fill

from qlae.data import DATASETS
from qlae.data.base import Dataset
from qlae.data.converted import ConvertedDataset
from qlae.data.download import download
from qlae.data.files import data_root, missing_files
from qlae.errors import UserError

HEADINGS = ("name", "images", "pixels", "state", "licence")
WIDTH, INDENT = 100, "    "


def prepare(name: str, root: str | Path | None) -> Dataset:
    """The set called `name`, downloaded where its files have an address of their own, and converted.

    Raises:
        UserError: unknown name, a file that has to be fetched by hand, or what download and conversion raise.
    """
    if name not in DATASETS:
        raise UserError(f"no data set '{name}': give one of {', '.join(sorted(DATASETS))}")
    kind = DATASETS[name]
    folder = data_root(root)
    if issubclass(kind, ConvertedDataset) and kind.state(folder) != "converted":
        missing = missing_files(folder, kind.files)
        for file in missing:
            if file.by_hand:
                raise UserError(
                    f"{name} cannot be downloaded from here: {file.instruction(folder)}; then run this again"
                )
        for file in missing:
            download(file, folder)
    return kind.load(root=root)


def list_datasets(root: str | Path | None) -> str:
    """All sets: number of images, sizes, licence and whether they are there; then what they show and their factors."""
    folder = data_root(root)
    kinds = {name: edition(kind, folder) for name, kind in DATASETS.items()}
    rows = [row(name, kind, folder) for name, kind in kinds.items()]
    widths = [max(map(len, column)) for column in zip(HEADINGS, *rows, strict=True)]
    lines = [aligned(HEADINGS, widths)]
    for cells, kind in zip(rows, kinds.values(), strict=True):
        lines += [aligned(cells, widths), details(kind)]
    lines += ["FOLDER", f"{INDENT}any folder of images, without known factors"]
    return "\n".join(lines)


def edition(kind: type[Dataset], root: Path) -> type[Dataset]:
    """The class for the files that are there; the set's own where they cannot be read."""
    if not issubclass(kind, ConvertedDataset):
        return kind
    try:
        return kind.edition(root)
    except UserError:
        return kind


def row(name: str, kind: type[Dataset], root: Path) -> tuple[str, ...]:
    length = prod(factor.size for factor in kind.factors)
    pixels = "/".join(str(resolution) for resolution in kind.resolutions)
    return name, f"{length:,}", pixels, kind.state(root), kind.licence


def aligned(cells: tuple[str, ...], widths: list[int]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()


def details(kind: type[Dataset]) -> str:
    """What a set shows, and its factors with their numbers of values."""
    factors = ", ".join(f"{factor.name}[{factor.size}]" for factor in kind.factors)
    return fill(f"{kind.summary}: {factors}", WIDTH, initial_indent=INDENT, subsequent_indent=INDENT)
