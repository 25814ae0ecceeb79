from dataclasses import fields, replace
from pathlib import Path

import pytest

from qlae.compare.grid import Choice, Grid, load_grid, load_whole_grid, slug
from qlae.compare.job import completed
from qlae.errors import UserError
from qlae.methods import METHODS
from qlae.presets import preset

GRID = """
preset: paper
options: {steps: 300, evaluation_every: 100}
data:
  rooms3d: {resolution: 16, weight_decay: 0.2}
  shapes3d: {}
seeds: [3, 1]
rows:
  QLAE: {}
  QLAE, no weight decay: {weight_decay: 0}
  n_v = 20:
    levels: 20
    per_data:
      shapes3d: {levels: 30, steps: 50}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "grid.yaml"
    path.write_text(GRID)
    return path


def refused(path: Path, text: str) -> str:
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_grid(str(path))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_cells_are_all_combinations_with_the_first_seed_of_everything_first(file: Path) -> None:
    grid = load_grid(str(file))
    assert grid.data == ("rooms3d", "shapes3d")
    assert grid.rows == ("QLAE", "QLAE, no weight decay", "n_v = 20")
    assert [cell.name for cell in grid.cells] == [
        f"{data}/{row}/seed{seed}"
        for seed in (3, 1)
        for data in ("rooms3d", "shapes3d")
        for row in ("qlae", "qlae-no-weight-decay", "n-v-20")
    ]


def test_later_layers_win(file: Path) -> None:
    grid = load_grid(str(file))
    options = ("steps", "resolution", "weight_decay", "levels", "batch_size")
    values = {
        (cell.data, cell.row): tuple(getattr(cell.config, name) for name in options)
        for cell in grid.cells
        if cell.config.seed == 1
    }
    assert values == {
        ("rooms3d", "QLAE"): (300, 16, 0.2, 10, 128),
        ("rooms3d", "QLAE, no weight decay"): (300, 16, 0, 10, 128),
        ("rooms3d", "n_v = 20"): (300, 16, 0.2, 20, 128),
        ("shapes3d", "QLAE"): (300, 64, 0.1, 10, 128),
        ("shapes3d", "QLAE, no weight decay"): (300, 64, 0, 10, 128),
        ("shapes3d", "n_v = 20"): (50, 64, 0.1, 30, 128),
    }
    assert all(cell.config.data == cell.data for cell in grid.cells)


def test_the_command_line_wins_over_the_file(file: Path) -> None:
    choice = Choice(rows=("n_v = 20", "QLAE"), data=("shapes3d",), seeds=(7,), steps=9, device="cpu", root=file.parent)
    grid = load_grid(str(file), choice)
    assert [cell.name for cell in grid.cells] == ["shapes3d/n-v-20/seed7", "shapes3d/qlae/seed7"]
    for cell in grid.cells:
        assert (cell.config.steps, cell.config.device, cell.config.root) == (9, "cpu", file.parent)


def test_the_whole_grid_has_the_files_parts_and_the_chosen_ones(file: Path) -> None:
    choice = Choice(rows=("n_v = 20",), data=("mpi3d", "shapes3d"), seeds=(7, 1), steps=9, device="cpu")
    whole = load_whole_grid(str(file), choice)
    assert whole.data == ("rooms3d", "shapes3d", "mpi3d")
    assert whole.rows == ("QLAE", "QLAE, no weight decay", "n_v = 20")
    assert whole.seeds == (3, 1, 7)
    assert set(load_grid(str(file), choice).cells) < set(whole.cells)


def test_a_chosen_folder_stands_for_the_files_of_its_name(file: Path) -> None:
    for parent in ("one", "other"):
        (file.parent / parent / "pictures").mkdir(parents=True)
    file.write_text(f"data: [{file.parent}/one/pictures]\nrows: {{QLAE: {{}}}}\nseeds: [0]")
    other = str(file.parent / "other" / "pictures")
    (cell,) = load_whole_grid(str(file), Choice(data=(other,))).cells
    assert (cell.data, cell.config.data) == ("pictures", other)


def test_a_folder_of_images_is_known_by_its_last_name(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (file.parent / "my pictures").mkdir()
    monkeypatch.chdir(file.parent)
    (cell,) = load_grid(str(file), Choice(rows=("QLAE",), data=("my pictures",), seeds=(0,))).cells
    assert cell.name == "my-pictures/qlae/seed0"
    # as a run in it has it, wherever it is asked from
    assert cell.config.data == str(file.parent / "my pictures")


def test_defaults_of_a_file(file: Path) -> None:
    file.write_text("rows: {QLAE: }")
    grid = load_grid(str(file))
    assert (grid.data, grid.seeds) == (("rooms3d",), (0, 1, 2))
    assert grid.cells[0].config == preset("default")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rows: [1", "is not YAML"),
        ("[]", "the file should have one 'name: value' a line"),
        ("seeds: [0]", "'rows' is missing"),
        ("rows: {}", "'rows' is empty"),
        ("row: {QLAE: {}}", "unknown key 'row'"),
        ("rows: {yes: {}}", "names that YAML reads as text"),
        ("rows:\n  A: {}\n  A: {levels: 4}", "'A' stands twice"),
        ("rows: {a b: {}, a-B: {}}", "'a b' and 'a-B' would share a folder"),
        ("rows: {'!': {}}", "'!' has no letter or digit"),
        ("rows: {A: {colour: 1}}", "row 'A': unknown option 'colour'"),
        ("rows: {A: {levels: many}}", "row 'A': levels is 'many', which should be a whole number"),
        ("rows: {A: {levels: 0}}", "row 'A': --levels is 0, which should be at least 1"),
        ("rows: {A: {seed: 1}}", "row 'A' sets 'seed': list seeds under 'seeds'"),
        ("rows: {A: {data: x}}", "row 'A' sets 'data': list data sets under 'data'"),
        ("options: {device: cpu}\nrows: {A: {}}", "options sets 'device': give --device"),
        ("rows: {A: {per_data: {mpi3d: {}}}}", "row 'A', 'per_data' names 'mpi3d', which is not under 'data'"),
        ("preset: best\nrows: {A: {}}", "unknown preset 'best'"),
        ("data: []\nrows: {A: {}}", "'data' is empty"),
        ("data: 3\nrows: {A: {}}", "data should have one 'name: value' a line"),
        ("seeds: 3\nrows: {A: {}}", "which should be a list of whole numbers from 0"),
        ("seeds: [-1]\nrows: {A: {}}", "which should be a list of whole numbers from 0"),
        ("seeds: [true]\nrows: {A: {}}", "which should be a list of whole numbers from 0"),
        ("seeds: [1, 1]\nrows: {A: {}}", "which should differ"),
    ],
)
def test_a_wrong_file_is_one_line_that_names_it(file: Path, text: str, message: str) -> None:
    line = refused(file, text)
    assert message in line


@pytest.mark.parametrize(("text", "number"), [("1e-3", 0.001), ("2.5E+1", 25.0), ("0.5", 0.5)])
def test_numbers_with_an_exponent_are_numbers(file: Path, text: str, number: float) -> None:
    file.write_text(f"rows: {{A: {{learning_rate: {text}}}}}")
    assert load_grid(str(file)).cells[0].config.learning_rate == number


def test_unknown_names_are_refused(file: Path) -> None:
    with pytest.raises(UserError, match="no comparison 'fast': give one of quick, paper, ablations, or a YAML file"):
        load_grid("fast")
    with pytest.raises(UserError, match=r"--rows 'VAE': .* has the rows 'QLAE', 'QLAE, no weight decay', 'n_v = 20'"):
        load_grid(str(file), Choice(rows=("VAE",)))
    with pytest.raises(UserError, match="name each row once"):
        load_grid(str(file), Choice(rows=("QLAE", "QLAE")))


def test_slugs() -> None:
    assert slug("QLAE, n_v = 20") == "qlae-n-v-20"
    assert slug("../β-VAE/") == "vae"
    assert slug("decay 0.1") == "decay-0.1"


PUBLISHED_DATA = ("shapes3d", "mpi3d_complex", "falcor3d", "isaac3d")


def differing(grid: Grid, row: str, data: str) -> dict[str, object]:
    """What a row sets otherwise than the row QLAE on the same data."""
    (base, *_), (config, *_) = ([cell.config for cell in grid.of(data, each)] for each in ("QLAE", row))
    names = [field.name for field in fields(config) if getattr(config, field.name) != getattr(base, field.name)]
    return {name: getattr(config, name) for name in names}


def test_the_preset_paper_has_the_published_rows() -> None:
    grid = load_grid("paper")
    assert (grid.data, grid.seeds) == (PUBLISHED_DATA, tuple(range(7)))
    methods = {cell.row: cell.config.method for cell in grid.cells}
    assert methods == {
        "AE": "ae",
        "VAE": "vae",
        "beta-TCVAE": "tcvae",
        "BioAE": "bioae",
        "VQ-VAE": "vqvae",
        "QLAE": "qlae",
        "FSQ": "fsq",
        "InfoWGAN-GP": "infowgan-gp",
        "QLInfoWGAN-GP": "qlinfowgan-gp",
    }
    assert {(cell.config.split, cell.config.steps, cell.config.network) for cell in grid.cells} == {
        ("reference", 200_000, "paper")
    }
    decay = {(cell.data, cell.row): cell.config.weight_decay for cell in grid.cells}
    assert (decay["shapes3d", "QLAE"], decay["mpi3d_complex", "QLAE"], decay["isaac3d", "VQ-VAE"]) == (0.1, 1e-3, 0.01)
    assert {cell.config.beta for cell in grid.cells if cell.row == "VAE"} == {3.0, 0.1, 10.0, 0.3}


@pytest.mark.parametrize("data", PUBLISHED_DATA)
def test_the_preset_ablations_changes_one_thing_a_row(data: str) -> None:
    grid = load_grid("ablations")
    assert (grid.data, grid.seeds) == (PUBLISHED_DATA, tuple(range(7)))
    assert {cell.config.split for cell in grid.cells} == {"reference"}
    assert {row: differing(grid, row, data) for row in grid.rows if "VAE" not in row} == {
        "QLAE": {},
        "QLAE, no weight decay": {"weight_decay": 0.0},
        "QLAE, global codebook": {"codebook": "global"},
        "QLAE, fixed values": {"codebook": "fixed"},
        "QLAE, n_v = 5": {"levels": 5},
        "QLAE, n_v = 20": {"levels": 20},
        "QLAE, n_v = 40": {"levels": 40},
    }
    vqvae, without_decay = (grid.of(data, row)[0].config for row in ("VQ-VAE", "VQ-VAE, no weight decay"))
    assert (vqvae.method, vqvae.weight_decay) == ("vqvae", 0.01)
    assert without_decay == replace(vqvae, weight_decay=0.0)
    assert len(grid.rows) == 9


def test_the_preset_quick_has_every_method_and_ablations() -> None:
    grid = load_grid("quick")
    assert (grid.data, grid.seeds) == (("rooms3d",), (0, 1, 2))
    assert {cell.config.method for cell in grid.cells} == set(METHODS)
    ablations = {row: differing(grid, row, "rooms3d") for row in grid.rows if row.startswith("QLAE")}
    assert ablations == {
        "QLAE": {},
        "QLAE, no weight decay": {"weight_decay": 0.0},
        "QLAE, weight decay 2": {"weight_decay": 2.0},
        "QLAE, n_v = 5": {"levels": 5},
        "QLAE, n_v = 20": {"levels": 20},
        "QLAE, global codebook": {"codebook": "global"},
        "QLAE, fixed values": {"codebook": "fixed"},
    }


def test_every_row_of_quick_builds_a_model() -> None:
    assert len(completed(load_grid("quick")).cells) == 45
