import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from qlae import figures, training
from qlae.checkpoint import STATE, WEIGHTS
from qlae.cli import main
from qlae.compare.cells import GridFolder
from qlae.compare.grid import Choice, Grid, load_grid
from qlae.compare.worker import record_failure, work
from qlae.config import METHOD_OPTIONS, TrainConfig, option
from qlae.data import DATASETS
from qlae.method_options import OPTIONS
from qlae.methods import METHODS
from qlae.metrics import infomec
from qlae.training import Trainer

ROOT = Path(__file__).parents[2]
QUICK = ["--data", "tiny", "--steps", "6", "--evaluation-every", "3", "--batch-size", "8", "--device", "cpu"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "write_figures", lambda *_: None)


@pytest.fixture
def run(tiny: object, without_figures: None, here: Path) -> Path:
    """A finished run on the tiny data set."""
    assert main(["train", *QUICK, "--output", "run"]) == 0
    return here / "run"


@pytest.fixture
def images(here: Path) -> Path:
    """A folder of 40 small grey pictures."""
    folder = here / "pictures"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, size=(40, 8, 8), dtype=np.uint8)
    for number, picture in enumerate(pixels):
        Image.fromarray(picture).save(folder / f"{number:02}.png")
    return folder


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line with which the command refuses."""
    capsys.readouterr()
    assert main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("qlae: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_train_writes_a_run_and_tells_where(tiny: object, capsys: pytest.CaptureFixture[str], here: Path) -> None:
    assert main(["train", "qlae", *QUICK, "--seed", "3"]) == 0
    output = capsys.readouterr().out
    folder = Path("runs") / "tiny-qlae-seed3"
    assert f"figures  {folder / 'figures'}" in output
    assert "tiny: 64 images of 4 x 4 pixels" in output
    assert all(name in output for name in ("step 3:", "step 6:", "InfoM", "InfoC", "InfoE", "PSNR", "active"))
    assert list((here / folder / "figures").glob("*.png"))


def test_evaluate_gives_the_scores_of_the_summary(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["evaluate", "run", "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    summary = json.loads((run / "summary.json").read_text())
    assert scores == {name: value for name, value in summary.items() if name not in ("seconds", "steps")}
    assert main(["evaluate", "run"]) == 0
    table = capsys.readouterr().out
    assert f"{summary['infom']:.3f}" in table and f"{summary['psnr']:.2f} dB" in table


def test_evaluate_and_traverse_change_nothing_but_the_picture(run: Path) -> None:
    before = contents(run)
    assert main(["evaluate", "run"]) == 0
    assert main(["traverse", "run", "--image", "2"]) == 0
    after = contents(run)
    assert set(after) - set(before) == {"figures/traversal-image-2.png"}
    assert all(after[name] == content for name, content in before.items())


def test_traverse_prints_the_path_of_its_picture(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["traverse", "run", "--output", "elsewhere/picture.png"]) == 0
    assert capsys.readouterr().out == "elsewhere/picture.png\n"
    with Image.open("elsewhere/picture.png") as picture:
        assert picture.width > 100
    assert "evaluation images 0 to 5" in refused(capsys, "traverse", "run", "--image", "6")
    assert "evaluation images 0 to 5" in refused(capsys, "traverse", "run", "--image", "-1")


def test_a_folder_of_pictures(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--steps", "4", "--evaluation-every", "2", "--batch-size", "16", "--device", "cpu"]
    assert main(["train", "--data", "pictures", "--output", "run", *options]) == 0
    output = capsys.readouterr().out
    assert "PSNR" in output and "InfoM" not in output
    summary = json.loads(Path("run/summary.json").read_text())
    assert summary["infom"] is None and summary["num_latents"] == 12
    assert "infom" not in Path("run/metrics.csv").read_text()
    # the run knows its pictures wherever it is asked from
    Path("elsewhere").mkdir()
    os.chdir("elsewhere")
    assert main(["evaluate", "../run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["psnr"] == summary["psnr"]


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    output = capsys.readouterr().out
    assert torch.__version__ in output and "reference" in output
    assert all(name in output for name in ("qlae", "compact", "paper", "rooms3d", "shapes3d"))


def test_data_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "list"]) == 0
    output = capsys.readouterr().out
    assert all(name in output for name in DATASETS)
    assert "our own rendering" in output and "CC BY 4.0" in output and "missing" in output


def help_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main([*arguments, "--help"])
    assert caught.value.code == 0
    lines = (line.strip("│ \n") for line in capsys.readouterr().out.splitlines())
    return " ".join(" ".join(lines).split())


def test_help_explains_every_option_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(capsys, "train")
    names = [option(field.name) for field in fields(TrainConfig)]
    for name in [*names, "--preset", "--output", "--resume", "--time-limit"]:
        mark = " [METHOD] " if name == "METHOD" else f" {name} "
        # other options may mention it too
        explanations = [part.split("(default: ")[0].split() for part in text.split(mark)[1:]]
        assert any(2 <= len(words) <= 40 for words in explanations), name
    assert "None" not in text
    assert all(name in text for name in METHODS)


def default_in_help(capsys: pytest.CaptureFixture[str], option: str, *arguments: str) -> str:
    explanation = help_of(capsys, *arguments).split(f" {option} ")[1]
    return explanation.split("(default: ")[1].split(")")[0]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--levels K", "512"),
        ("--quantization-weight X", "1.0"),
        ("--commitment-weight X", "0.25"),
        ("--beta X", "this method has none"),
    ],
)
def test_help_shows_the_methods_own_options(capsys: pytest.CaptureFixture[str], option: str, value: str) -> None:
    assert default_in_help(capsys, option, "train", "vqvae", "--preset", "paper") == value


def test_the_help_needs_no_torch() -> None:
    program = "import sys; from qlae.cli import _parse; _parse(['train', 'vae']); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})


@pytest.mark.parametrize("name", METHOD_OPTIONS)
def test_an_options_help_names_the_methods_that_have_it(capsys: pytest.CaptureFixture[str], name: str) -> None:
    text = help_of(capsys, "train").split(f" {option(name)} ")[1].split("(default: ")[0]
    found = {method for method in METHODS if re.search(rf"[( ]{method}[,)]", text)}
    assert found == {method for method, options in OPTIONS.items() if name in options}


def test_help_shows_the_preset_and_the_run_that_goes_on(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert "(default: 200000)" in help_of(capsys, "train", "--preset", "paper")
    assert "(default: 0.0002)" in help_of(capsys, "train", "infowgan-gp", "--preset", "paper")
    default = default_in_help(capsys, "--beta X", "train", "--preset", "paper", "vae", "--data", "shapes3d")
    assert default == "3.0"
    assert "(default: tiny)" in help_of(capsys, "train", "--resume", "run")


@pytest.mark.parametrize("command", ["evaluate", "traverse", "metrics", "compare", "info", "data"])
def test_every_command_has_help(capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert f"usage: qlae {command}" in help_of(capsys, command)


@pytest.mark.parametrize("arguments", [[], ["train", "--stepps", "3"], ["train", "--steps", "many"], ["evaluate"]])
def test_what_cannot_be_parsed_exits_with_2(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gae"], "unknown method 'gae': choose one of qlae"),
        (["ae", "--beta", "2"], "--beta 2.0: the method ae has no such option"),
        (["--codebook", "random"], "--codebook is random, which should be one of learned, global, fixed"),
        (["--data", "shapes5d"], "shapes5d"),
        (["--network", "huge"], "unknown network 'huge': choose one of compact, compact-gan, paper, small"),
        (["--preset", "best"], "unknown preset 'best': choose one of default, paper"),
        (["--device", "tpu"], "--device is tpu, which should be one of auto, cpu, cuda"),
        (["--split", "none"], "--split is none, which should be one of held-out, reference"),
        (["--schedule", "linear"], "--schedule is linear, which should be one of constant, cosine"),
        (["--levels", "0"], "--levels is 0, which should be at least 1"),
        (["--time-limit", "0"], "--time-limit is 0.0, which should be a positive number of minutes"),
        (["--network", "paper"], "sides are multiples of 16"),
        (["--output", "file/run"], "cannot write the run folder file/run"),
        (["--resume", "nothing"], "there is no run folder nothing"),
        (["--resume", "."], "not a run folder"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    tiny: object, capsys: pytest.CaptureFixture[str], here: Path, arguments: list[str], message: str
) -> None:
    (here / "file").write_text("")
    assert message in refused(capsys, "train", *QUICK, *arguments)
    assert [path.name for path in here.iterdir()] == ["file"]


def test_an_existing_run_is_not_overwritten(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(run)
    line = refused(capsys, "train", *QUICK, "--output", "run")
    assert "--resume run" in line and "--output" in line
    assert contents(run) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--levels", "4"], "--levels 4: the run in run has 10 and keeps it"),
        (["--data", "rooms3d"], "--data rooms3d: the run in run has tiny"),
        (["--output", "other"], "--output and --resume exclude each other"),
        (["--preset", "paper"], "--preset and --resume exclude each other"),
        (["--steps", "2"], "has taken 6 steps"),
    ],
)
def test_a_resumed_run_keeps_its_options(
    run: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    before = contents(run)
    assert message in refused(capsys, "train", "--resume", "run", *arguments)
    assert contents(run) == before


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_trained_scored_and_resumed(
    tiny: object, without_figures: None, here: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", method, *QUICK, "--output", "run"]) == 0
    summary = json.loads((here / "run" / "summary.json").read_text())
    assert (summary["perplexity"] is not None) == ("perplexity" in capsys.readouterr().out)
    assert main(["evaluate", "run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["psnr"] == summary["psnr"]
    assert main(["train", "--resume", "run", "--steps", "8"]) == 0


@pytest.mark.parametrize(
    ("method", "own"), [("qlinfowgan-gp", {"samples", "code_usage"}), ("vae", set()), ("vqvae", {"code_usage"})]
)
def test_every_kind_of_latent_has_its_figures(tiny: object, here: Path, method: str, own: set[str]) -> None:
    few_codes = ["--levels", "7"] if "code_usage" in own else []
    assert main(["train", method, *QUICK, *few_codes, "--output", "run"]) == 0
    assert main(["traverse", "run"]) == 0
    figures = {path.stem for path in (here / "run" / "figures").iterdir()}
    assert figures == {"curves", "reconstructions", "traversals", "traversal-image-0", "nmi"} | own


def test_a_run_has_the_presets_values_for_its_method_and_data(tiny: object, without_figures: None) -> None:
    assert main(["train", *QUICK, "infowgan-gp", "--preset", "paper", "--network", "compact", "--output", "run"]) == 0
    config = yaml.safe_load(Path("run/config.yaml").read_text())
    assert (config["method"], config["learning_rate"], config["weight_decay"]) == ("infowgan-gp", 2e-4, 1e-4)
    assert (config["steps"], config["latent_weight"], config["beta"]) == (6, 200.0, None)


def test_resume_with_more_steps(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--resume", "run", "--steps", "9"]) == 0
    assert "step 9:" in capsys.readouterr().out
    assert json.loads((run / "summary.json").read_text())["steps"] == 9


@pytest.mark.parametrize("command", [["evaluate", "run"], ["traverse", "run"], ["train", "--resume", "run"]])
@pytest.mark.parametrize("damage", ["config.yaml", "levels", "text", WEIGHTS, "checkpoint"])
def test_a_damaged_run_is_refused_by_every_command(
    run: Path, capsys: pytest.CaptureFixture[str], command: list[str], damage: str
) -> None:
    config, weights = run / "config.yaml", run / "checkpoint" / WEIGHTS
    text = config.read_text()
    if damage == "config.yaml":
        config.unlink()
        message = "it has no config.yaml"
    elif damage == "levels":
        config.write_text(text.replace("levels: 10", "levels: 12"))
        message = "was trained with levels 10"
    elif damage == "text":
        config.write_text(text + "colour: blue\n")
        message = "unknown option 'colour'"
    elif damage == WEIGHTS:
        weights.write_bytes(weights.read_bytes()[:1000])
        message = f"{WEIGHTS} is truncated or damaged"
    else:
        (run / "checkpoint").rename(run / "moved")
        message = "there is no checkpoint run/checkpoint"
    before = contents(run)
    assert message in refused(capsys, *command)
    assert contents(run) == before


def test_resume_refuses_a_damaged_training_state(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = run / "checkpoint" / STATE
    state.write_bytes(state.read_bytes()[:1000])
    assert f"{STATE} is truncated or damaged" in refused(capsys, "train", "--resume", "run")
    assert main(["evaluate", "run"]) == 0


def test_divergence_exits_with_1(
    tiny: object, without_figures: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = Trainer._take_step

    def take_step(trainer: Trainer) -> None:
        if trainer.step == 4:
            trainer.method.decoder.bias.data.fill_(float("nan"))
        original(trainer)

    monkeypatch.setattr(Trainer, "_take_step", take_step)
    assert main(["train", *QUICK, "--output", "run"]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("qlae: error: the loss became nan in step 5; the last good checkpoint is run/checkpoint")


def test_a_process_stops_on_sigint_and_goes_on(images: Path) -> None:
    """As a person types it: start, interrupt, resume, score."""
    command = [sys.executable, "-P", "-m", "qlae"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    options = ["--data", "pictures", "--evaluation-every", "20", "--device", "cpu", "--output", "run"]
    process = subprocess.Popen(
        [*command, "train", "--steps", "1000000", *options],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120.0
    while not Path("run/checkpoint").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=120.0)
    assert process.returncode == 130, errors
    assert "go on with: qlae train --resume run" in output
    assert "Traceback" not in errors
    step = torch.load(f"run/checkpoint/{STATE}", weights_only=True)["step"]
    assert step > 0

    assert main(["train", "--resume", "run", "--steps", str(step + 2)]) == 0
    assert json.loads(Path("run/summary.json").read_text())["steps"] == step + 2


def test_images_that_are_not_square() -> None:
    """A run on them can be evaluated, looked at and resumed."""
    Path("wide").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (30, 8, 12, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(f"wide/{number:02}.png")
    options = ["--evaluation-every", "2", "--batch-size", "4", "--device", "cpu"]
    assert main(["train", "--data", "wide", "--steps", "4", "--output", "run", *options]) == 0
    assert main(["evaluate", "run"]) == 0
    assert main(["traverse", "run"]) == 0
    assert main(["train", "--resume", "run", "--steps", "6"]) == 0


def test_a_run_whose_images_have_changed_does_not_go_on(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--data", "pictures", "--steps", "4", "--evaluation-every", "2", "--device", "cpu", "--output", "run"]
    assert main(["train", *options]) == 0
    first = next(Path("pictures").rglob("*.png"))
    before = first.read_bytes()
    Image.new("L", (8, 8)).save(first)
    for command in (["train", "--resume", "run", "--steps", "6"], ["evaluate", "run"], ["traverse", "run"]):
        assert "restore the images" in refused(capsys, *command)
    first.unlink()
    assert "restore the images" in refused(capsys, "train", "--resume", "run", "--steps", "6")
    first.write_bytes(before)
    assert main(["evaluate", "run"]) == 0


@pytest.fixture
def codes(here: Path) -> Path:
    """Codes that tell two sources, one of them badly."""
    generator = np.random.default_rng(0)
    sources = generator.integers(0, (4, 3), (200, 2))
    latents = np.where(generator.random((200, 3)) < 0.7, sources[:, [0, 1, 0]], 0)
    np.savez(here / "codes.npz", latents=latents, sources=sources)
    return here / "codes.npz"


def test_metrics_prints_all_scores_and_writes_a_picture(codes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["metrics", "codes.npz", "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["samples"] == 200 and scores["active"] == [True] * 3 and len(scores["nmi"][0]) == 3
    Path("codes-nmi.png").unlink()
    assert main(["metrics", "codes.npz"]) == 0
    table = capsys.readouterr().out
    for name in ("infom", "infoc", "infoe", "dci_disentanglement", "mig", "sap", "factor_vae", "beta_vae", "irs"):
        assert any(line.split()[:2] == [name, f"{scores[name]:.3f}"] for line in table.splitlines()), name
    assert table.endswith("figure  codes-nmi.png\n")
    with Image.open("codes-nmi.png") as picture:
        assert picture.width > 100


def test_metrics_takes_its_options(codes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--continuous", "--protocol", "training", "--explicitness", "regression", "--held-out", "0.3"]
    assert main(["metrics", "codes.npz", "--json", "--output", "new/picture.png", *options]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["settings"]["protocol"] == "training"
    assert list(Path("new").iterdir()) == [Path("new/picture.png")]
    with np.load(codes) as arrays:
        latents, sources = arrays["latents"], arrays["sources"]
    settings = {"protocol": "training", "explicitness": "regression", "held_out": 0.3}
    expected = infomec(latents, sources, discrete=False, **settings)
    assert (scores["infom"], scores["infoe"]) == (expected.infom, expected.infoe)


@pytest.mark.parametrize(
    ("arrays", "options", "message"),
    [
        ({"latents": np.zeros(5, int)}, [], "codes.npz: latents must have shape [N, n_z]"),
        ({"latents": np.zeros((5, 2), int)}, [], "codes.npz: latents and sources must have the same length"),
        ({"latents": np.zeros((200, 2))}, [], "codes.npz: latents are float64, not codes: give --continuous"),
        ({"latents": np.full((200, 2), np.nan)}, ["--continuous"], "codes.npz: latents must be finite, got NaN"),
        ({"sources": np.full((200, 2), 0.5)}, [], "codes.npz: sources must be whole numbers"),
        ({}, ["--neighbors", "0"], "neighbors must be at least 1, got 0"),
        ({}, ["--iterations", "0"], "iterations must be at least 1, got 0"),
        ({}, ["--protocol", "paper"], "protocol must be one of standalone, training, tripod, got 'paper'"),
        ({}, ["--held-out", "2"], "held_out must be a share in [0, 1), got 2.0"),
    ],
)
def test_metrics_refuses_bad_input_in_one_line(
    codes: Path,
    capsys: pytest.CaptureFixture[str],
    arrays: dict[str, np.ndarray],
    options: list[str],
    message: str,
) -> None:
    with np.load(codes) as saved:
        np.savez(codes, **(dict(saved) | arrays))
    assert message in refused(capsys, "metrics", "codes.npz", *options)
    assert os.listdir() == ["codes.npz"]


def test_metrics_gives_the_other_scores_where_one_has_no_value(codes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sources = np.arange(400).reshape(200, 2)
    np.savez(codes, latents=sources // 40, sources=sources)
    assert main(["metrics", "codes.npz", "--json"]) == 0
    captured = capsys.readouterr()
    scores = json.loads(captured.out)
    assert scores["infoe"] > 0 and scores["mig"] is not None and captured.err == ""
    lost = ["dci_disentanglement", "dci_completeness", "dci_informativeness", "sap", "factor_vae", "beta_vae"]
    assert [name for name in scores if scores[name] is None] == [*lost, "explicitness"]
    reasons = [note.split(": ")[0] for note in scores["notes"]]
    assert reasons == [f"{name} has no value" for name in ("dci", "sap", "factor_vae", "beta_vae", "explicitness")]
    assert main(["metrics", "codes.npz"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "sap                       -  accuracy gap between a source's best two latents" in lines
    assert "sap has no value: held_out=0.333333 of 200 samples in 200 classes leaves 0 to score" in "\n".join(lines)


def test_metrics_says_how_its_scores_were_computed(codes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("discrete", "explicitness", "held_out", "neighbors", "iterations", "seed", "dci_model", "protocol")
    assert main(["metrics", "codes.npz", "--json"]) == 0
    settings = json.loads(capsys.readouterr().out)["settings"]
    assert [settings[name] for name in names] == [
        True,
        "classification",
        0,
        None,
        100,
        0,
        "random_forest",
        "standalone",
    ]
    options = ["--continuous", "--protocol", "training", "--seed", "3", "--held-out", "0.25", "--iterations", "7"]
    assert main(["metrics", "codes.npz", "--json", *options, "--explicitness", "regression"]) == 0
    settings = json.loads(capsys.readouterr().out)["settings"]
    assert [settings[name] for name in names] == [False, "regression", 0.25, 3, 7, 3, "random_forest", "training"]


def test_metrics_takes_quantized_values_for_the_protocols_that_see_them(
    codes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with np.load(codes) as arrays:
        latents, sources = arrays["latents"], arrays["sources"]
    # The third latent's codes lie close together.
    values = latents * [1.0, 1.0, 0.01]
    np.savez(codes, latents=latents, sources=sources, values=values)
    for protocol, active in (("standalone", [True] * 3), ("training", [True, True, False])):
        assert main(["metrics", "codes.npz", "--json", "--protocol", protocol]) == 0
        scores = json.loads(capsys.readouterr().out)
        assert (scores["active"], scores["settings"]["from_values"]) == (active, protocol == "training")


def test_metrics_takes_neighbors_and_iterations(codes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--continuous", "--neighbors", "5", "--iterations", "2"]
    assert main(["metrics", "codes.npz", "--json", *options]) == 0
    scores = json.loads(capsys.readouterr().out)
    with np.load(codes) as arrays:
        expected = infomec(arrays["latents"], arrays["sources"], discrete=False, neighbors=5, iterations=2)
    assert (scores["nmi"], scores["infoe"]) == (expected.nmi.tolist(), expected.infoe)
    assert scores["infoe_converged"] is False and scores["settings"]["neighbors"] == 5


def test_metrics_refuses_a_foreign_file(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "codes.npz").write_text("latents")
    assert "codes.npz is not an .npz file" in refused(capsys, "metrics", "codes.npz")


def test_metrics_prints_its_scores_before_a_picture_that_cannot_be_written(
    codes: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("file").write_text("")
    assert main(["metrics", "codes.npz", "--json", "--output", "file/picture.png"]) == 2
    captured = capsys.readouterr()
    assert json.loads(captured.out)["samples"] == 200
    assert "cannot write file/picture.png" in captured.err and captured.err.count("\n") == 1
    Path("codes-nmi.png").write_bytes(b"older")

    def full(scores: object, names: list[str], path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(figures, "plot_nmi", full)
    assert main(["metrics", "codes.npz"]) == 2
    captured = capsys.readouterr()
    assert "infom" in captured.out and "No space left on device" in captured.err
    assert Path("codes-nmi.png").read_bytes() == b"older"
    assert sorted(os.listdir()) == ["codes-nmi.png", "codes.npz", "file"]


@pytest.fixture
def comparison(tiny: object, without_figures: None, here: Path) -> list[str]:
    """A comparison whose two cells are finished, and the command for it."""
    (here / "grid.yaml").write_text(
        "data: [tiny]\nseeds: [0]\nrows: {QLAE: {}, five: {levels: 5}}\n"
        "options: {steps: 6, evaluation_every: 3, batch_size: 8}\n"
    )
    grid = load_grid("grid.yaml", Choice(device="cpu"))
    work(grid.cells, GridFolder(Path("out")))
    return ["compare", "grid.yaml", "--output", "out", "--device", "cpu"]


def test_compare_draws_what_is_finished(comparison: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*comparison, "--table-only"]) == 0
    output = capsys.readouterr().out
    assert "| QLAE | " in output and "| five | " in output and "all 2 cells are finished" in output
    assert {path.name for path in Path("out").iterdir()} == {
        *("cells", "table.md", "table.csv", "table.tex", "seeds.csv", "figure-tiny.png")
    }
    assert main([*comparison, "--table-only", "--seeds", "0", "1", "--rows", "five"]) == 3
    output = capsys.readouterr().out
    assert "| five (1/2) | " in output and "QLAE" not in output and "1 cell of 2 left" in output


def test_a_choice_adds_to_the_table_of_the_rest(comparison: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    seeds = ["--seeds", "0", "1"]
    assert main([*comparison, "--table-only", "--rows", "five", *seeds]) == 3
    printed = capsys.readouterr().out
    assert "| five (1/2) | " in printed and "QLAE" not in printed
    table = Path("out/table.md").read_text()
    assert table.index("| QLAE (1/2) | ") < table.index("| five (1/2) | ")
    # seed 1 is not the grid's, and nobody asks for it now
    assert main([*comparison, "--table-only", "--rows", "five"]) == 0
    assert "| QLAE | " in Path("out/table.md").read_text() and "QLAE" not in capsys.readouterr().out
    with Path("out/seeds.csv").open() as file:
        assert len(file.readlines()) == 3


def test_rows_that_are_not_chosen_need_the_grids_configuration_too(
    comparison: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    text = Path("grid.yaml").read_text()
    Path("grid.yaml").write_text(text.replace("QLAE: {}", "QLAE: {levels: 9}"))
    assert "'QLAE' on tiny has 9 now" in refused(capsys, *comparison, "--table-only", "--rows", "five")


def test_retry_takes_cells_that_failed_up_again(
    comparison: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the job's own process, which stands for its worker."""

    def run_job(grid: Grid, folder: GridFolder, *, look: Callable[[], None], **_: object) -> None:
        work(grid.cells, folder)
        look()

    monkeypatch.setattr("qlae.compare.job.run_job", run_job)
    folder = GridFolder(Path("out"))
    cell = load_grid("grid.yaml", Choice(rows=("five",), device="cpu")).cells[0]
    folder.run(cell).summary_file.unlink()
    record_failure(folder, cell, "no such kernel")
    assert main(comparison) == 1
    assert "failed   tiny/five/seed0: no such kernel" in capsys.readouterr().out
    assert not folder.run(cell).summary_file.exists()
    # a failure among the rows that are not chosen stays
    assert main([*comparison, "--retry", "--rows", "QLAE"]) == 0
    assert folder.error(cell).exists()
    assert main([*comparison, "--retry"]) == 0
    assert not folder.error(cell).exists() and folder.run(cell).summary_file.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "9"], "was begun with --steps 6, and 'QLAE' on tiny has 9 now"),
        (["--rows", "VAE"], "--rows 'VAE': grid.yaml has the rows 'QLAE', 'five'"),
        (["--data", "shapes5d"], "no data set or folder 'shapes5d'"),
        (["--workers", "0"], "--workers is 0, which should be at least 1"),
        (["--time-limit", "0"], "--time-limit is 0.0, which should be a positive number of minutes"),
        (["--seeds", "1", "1"], "which should differ"),
    ],
)
def test_compare_refuses_what_cannot_be(
    comparison: list[str], capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    before = contents(Path("out"))
    assert message in refused(capsys, *comparison, *arguments)
    assert contents(Path("out")) == before
