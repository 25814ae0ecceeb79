"""The `qlae` command.

Commands import what they need when they run, so that `--help` need not wait for torch.
"""

import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from tyro.conf import FlagCreatePairsOff, OmitArgPrefixes, Positional, arg, subcommand

from qlae.config import TrainConfig, differences, option, with_method_options, without
from qlae.errors import UserError
from qlae.presets import preset
from qlae.run_folder import RunFolder

if TYPE_CHECKING:
    from qlae.data import Dataset
    from qlae.evaluation import Evaluation
    from qlae.methods import Method
    from qlae.training import Outcome

DESCRIPTION = "Quantized-latent autoencoders: train them, score them, look at them."

RunArgument = Annotated[Positional[Path], arg(metavar="RUN")]
DeviceOption = Annotated[str, arg(metavar="{auto,cpu,cuda}")]


@dataclass(frozen=True)
class Train:
    """Train a model; configuration, metrics, checkpoint and figures go into a run folder.

    Without options: a quantized-latent autoencoder on rooms3d, minutes on two CPU cores. docs/methods.md has all
    methods.
    """

    config: OmitArgPrefixes[TrainConfig]
    preset: Annotated[str, arg(metavar="{default,paper}")] = "default"
    """Values for all options that are not given: `default`, or `paper` for those of the publication. They depend on
    the method and the data; this help shows those of the preset, method and data that are given with it."""
    output: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint=without("runs/DATA-METHOD-seedN"))] = None
    """The new run's folder."""
    resume: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint=without("a new run"))] = None
    """Go on with the run in this folder, with its own options; --steps may be raised."""
    time_limit: Annotated[float | None, arg(metavar="MINUTES", help_behavior_hint=without("none"))] = None
    """End by this time, evaluation and figures included; --resume goes on later."""


@dataclass(frozen=True)
class Evaluate:
    """Score a trained run on its evaluation images."""

    run: RunArgument
    """Folder that `qlae train` wrote."""
    json: FlagCreatePairsOff[bool] = False
    """Print JSON instead of a table."""
    device: DeviceOption = "auto"
    """Where to compute."""


@dataclass(frozen=True)
class Traverse:
    """Draw one evaluation image with each latent in turn set to each of its codes, or moved through its range."""

    run: RunArgument
    """Folder that `qlae train` wrote."""
    image: int = 0
    """Which of the evaluation images, from 0."""
    output: Annotated[
        Path | None,
        arg(metavar="FILE", help_behavior_hint=without("traversal-image-N.png among the run's figures")),
    ] = None
    """Picture to write."""
    device: DeviceOption = "auto"
    """Where to compute."""


@dataclass(frozen=True)
class Compare:
    """Train a grid of methods, data sets and seeds as one job, and write its table and figures.

    The same command goes on where it stopped; several processes and machines may run it on one folder.
    """

    grid: Annotated[Positional[str], arg(metavar="[quick|paper|ablations|FILE.yaml]")] = "quick"
    """What to compare: `quick` needs no GPU, `paper` and `ablations` do; or a file of your own."""
    output: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint=without("runs/compare-GRID"))] = None
    """Folder of the comparison."""
    workers: Annotated[
        int | None, arg(metavar="N", help_behavior_hint=without("one for each GPU, or else CPU core"))
    ] = None
    """Processes, each with a cell at a time; they share the cores, and the GPUs, where there are some."""
    device: DeviceOption = "auto"
    """Where to compute."""
    root: Annotated[Path | None, arg(metavar="FOLDER", help_behavior_hint=without("$QLAE_DATA, else data"))] = None
    """Where downloaded data files lie."""
    rows: Annotated[tuple[str, ...] | None, arg(metavar="LABEL ...", help_behavior_hint=without("all"))] = None
    """Rows of the grid to work on, by their labels. Of the others, what is finished stays in the table."""
    data: Annotated[
        tuple[str, ...] | None, arg(metavar="NAME|FOLDER ...", help_behavior_hint=without("the grid's"))
    ] = None
    """Data sets in place of the grid's."""
    seeds: Annotated[tuple[int, ...] | None, arg(metavar="N ...", help_behavior_hint=without("the grid's"))] = None
    """Seeds in place of the grid's."""
    steps: Annotated[int | None, arg(metavar="N", help_behavior_hint=without("the grid's"))] = None
    """Training steps of every cell in place of the grid's."""
    time_limit: Annotated[float | None, arg(metavar="MINUTES", help_behavior_hint=without("none"))] = None
    """Save and end by this time; the same command goes on later."""
    table_only: FlagCreatePairsOff[bool] = False
    """Train nothing: write the table and the figures of the cells that are finished."""
    retry: FlagCreatePairsOff[bool] = False
    """Take cells that failed up again."""


@dataclass(frozen=True)
class Metrics:
    """Score latents against sources, by InfoMEC and the other scores of the field; a picture shows who tells what."""

    file: Annotated[Positional[Path], arg(metavar="FILE")]
    """An .npz file with arrays `latents` [N, n_z] and `sources` [N, n_s], from any framework; for the protocols
    training and tripod also `values` [N, n_z], what each code was quantized to."""
    json: FlagCreatePairsOff[bool] = False
    """Print JSON instead of a table."""
    continuous: FlagCreatePairsOff[bool] = False
    """The latents are real numbers, not codes."""
    protocol: Annotated[str, arg(metavar="{standalone,training,tripod}")] = "standalone"
    """Which published variant of InfoMEC to compute."""
    explicitness: Annotated[str, arg(metavar="{classification,regression}")] = "classification"
    """Whether InfoE predicts classes or values of the sources."""
    held_out: float = 0.0
    """Share of the samples that InfoE is scored on and not fitted to; 0, as published, scores what was fitted."""
    neighbors: Annotated[int | None, arg(metavar="K", help_behavior_hint=without("the protocol's: 10, training 3"))] = (
        None
    )
    """Nearest neighbours of InfoMEC's estimator for continuous latents."""
    iterations: int = 100
    """Most iterations of each regression of InfoE."""
    seed: int = 0
    """Seed of all draws."""
    output: Annotated[Path | None, arg(metavar="PNG", help_behavior_hint=without("FILE-nmi.png beside FILE"))] = None
    """Picture to write."""


@dataclass(frozen=True)
class Data:
    """List the data sets, get one ready, or draw what its factors do."""

    action: Positional[Literal["list", "prepare", "show"]] = "list"
    """`list` says which there are; `prepare` downloads one where that is possible, checks and converts it; `show`
    draws it, one row per factor."""
    name: Annotated[Positional[str | None], arg(metavar="[NAME]", help_behavior_hint=without("none"))] = None
    """The data set to prepare or show."""
    root: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint=without("$QLAE_DATA, else data"))] = None
    """Where downloaded data files lie."""
    resolution: Annotated[int | None, arg(metavar="PIXELS", help_behavior_hint=without("the largest one"))] = None
    """Height and width of the images that are shown."""
    image: Annotated[int | None, arg(metavar="N", help_behavior_hint=without("a fixed one"))] = None
    """Index of the image that is shown with each factor varied."""
    output: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint=without("NAME-factors.png"))] = None
    """Picture to write."""


@dataclass(frozen=True)
class Info:
    """Print versions, device, threads, quantizer backends and data sets."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code.

    0: done. 1: training diverged, or cells of a comparison failed. 2: a mistake in what was asked for.
    3: cells of a comparison are left. 128 + N: stopped by signal N.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        return _run(_parse(arguments))
    except UserError as error:
        print(f"qlae: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        # A full disk or a folder that cannot be written, wherever a run meets it; the message names the file.
        print(f"qlae: error: {error}: make room or mend the folder", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("qlae: stopped", file=sys.stderr)
        return 130


def _parse(arguments: list[str]) -> object:
    if arguments[:1] != ["train"]:
        return _parse_with(Train(TrainConfig()), arguments)
    # what is asked for decides the values of all that is not given
    asked = _parse_with(Train(TrainConfig()), [each for each in arguments if each not in ("-h", "--help")])
    return _parse_with(_train_defaults(asked), arguments)


def _parse_with(defaults: "Train", arguments: list[str]) -> object:
    commands = (
        Annotated[Train, subcommand("train", default=defaults)]
        | Annotated[Evaluate, subcommand("evaluate")]
        | Annotated[Traverse, subcommand("traverse")]
        | Annotated[Metrics, subcommand("metrics")]
        | Annotated[Compare, subcommand("compare")]
        | Annotated[Data, subcommand("data")]
        | Annotated[Info, subcommand("info")]
    )
    return tyro.cli(commands, prog="qlae", description=DESCRIPTION, args=arguments)


def _train_defaults(asked: "Train") -> "Train":
    """The options of `train` from the preset for method and data, or from the run that goes on."""
    if asked.resume is None:
        config = preset(asked.preset, asked.config.method, asked.config.data)
        return Train(with_method_options(config), preset=asked.preset)
    return Train(RunFolder.open(asked.resume)[1], preset=asked.preset)


def _run(command: object) -> int:
    match command:
        case Train():
            return _train(command)
        case Evaluate():
            return _evaluate(command)
        case Traverse():
            return _traverse(command)
        case Metrics():
            return _metrics(command)
        case Compare():
            return _compare(command)
        case Data():
            return _data(command)
        case _:
            return _info()


def _train(command: Train) -> int:
    from torch import OutOfMemoryError

    from qlae.training import DivergedError, resume, train

    try:
        if command.resume is None:
            path = command.output or default_output(command.config)
            outcome = train(command.config, path, time_limit=command.time_limit)
        else:
            path = command.resume
            _check_resume(command)
            outcome = resume(command.config, path, time_limit=command.time_limit)
    except DivergedError as error:
        print(f"qlae: error: {error}", file=sys.stderr)
        return 1
    except OutOfMemoryError as error:
        raise UserError("the GPU's memory is not enough: give a smaller --batch-size") from error
    return _report(path, outcome)


def _report(path: Path, outcome: "Outcome") -> int:
    if outcome.reason != "finished":
        print(f"{outcome.reason} after {outcome.step:,} steps; go on with: qlae train --resume {path}")
    if outcome.evaluation is None:
        return 128 + outcome.signal
    print(score_table(outcome.evaluation))
    print(f"run      {path}")
    print(f"figures  {path / 'figures'}")
    return 0


def _check_resume(command: Train) -> None:
    if command.output is not None:
        raise UserError("--output and --resume exclude each other: a resumed run stays in its folder")
    if command.preset != "default":
        raise UserError("--preset and --resume exclude each other: a resumed run keeps its options")
    _, saved = RunFolder.open(command.resume)
    for name in differences(saved, command.config):
        raise UserError(
            f"{option(name)} {getattr(command.config, name)}: the run in {command.resume} has "
            f"{getattr(saved, name)} and keeps it; leave the option out, or start a new run without --resume"
        )


def default_output(config: TrainConfig) -> Path:
    """runs/DATA-METHOD-seedN, DATA being the set's name or the folder's."""
    return Path("runs") / f"{Path(config.data).resolve().name}-{config.method}-seed{config.seed}"


def _evaluate(command: Evaluate) -> int:
    import json

    _, _, evaluation = _evaluated(command.run, command.device)
    print(json.dumps(evaluation.summary(), indent=2, allow_nan=False) if command.json else score_table(evaluation))
    return 0


def _traverse(command: Traverse) -> int:
    from qlae.data import held_out_split
    from qlae.evaluation import traverse
    from qlae.figures import plot_traversals, told_factors

    dataset, method, evaluation = _evaluated(command.run, command.device)
    _, index = held_out_split(len(dataset))
    if not 0 <= command.image < len(index):
        raise UserError(f"--image {command.image}: the run has evaluation images 0 to {len(index) - 1}")
    image = dataset.images(index[command.image : command.image + 1])
    strips = traverse(method, method.encode(image)[0], evaluation.positions)
    path = command.output or RunFolder(command.run).figures / f"traversal-image-{command.image}.png"
    told = told_factors(evaluation.infomec, [factor.name for factor in dataset.factors])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        plot_traversals(strips, evaluation.active, path, told=told, spacing=method.latent.spacing)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}): give another --output") from error
    print(path)
    return 0


def _evaluated(path: Path, device: str) -> "tuple[Dataset, Method, Evaluation]":
    """A run's data set, its trained method, and its scores on the evaluation images."""
    from qlae.data import held_out_split
    from qlae.evaluation import evaluate
    from qlae.loading import choose_device, load_model

    run, config = RunFolder.open(path)
    dataset, method = load_model(run, config, choose_device(device))
    _, index = held_out_split(len(dataset))
    return dataset, method, evaluate(method, dataset, index)


def _compare(command: Compare) -> int:
    from qlae.compare.cells import GridFolder, check_configs
    from qlae.compare.grid import Choice, load_grid, load_whole_grid
    from qlae.compare.job import check_options, completed, default_workers, run_job
    from qlae.compare.progress import Reporter
    from qlae.compare.results import forget_failures, last_word, there_or_chosen, write_results
    from qlae.compare.table import collect, markdown

    choice = Choice(command.rows, command.data, command.seeds, command.steps, command.device, command.root)
    grid, whole = load_grid(command.grid, choice), load_whole_grid(command.grid, choice)
    folder = GridFolder(command.output or Path("runs") / f"compare-{Path(command.grid).stem}")
    check_configs(folder, whole.cells)

    def write() -> None:
        write_results(there_or_chosen(whole, grid, folder), folder)

    number = None
    if not command.table_only:
        workers = default_workers(command.device) if command.workers is None else command.workers
        check_options(workers, command.time_limit)
        grid = completed(grid)
        check_configs(folder, grid.cells)
        if command.retry:
            forget_failures(grid, folder)
        reporter = Reporter(folder, grid.cells, on_change=write)
        number = run_job(grid, folder, workers=workers, time_limit=command.time_limit, look=reporter.look)
        reporter.end()
    write()
    print(markdown(collect(grid, folder)))
    text, code = last_word(grid, folder)
    print(text or f"all {len(grid.cells)} cells are finished")
    print(f"tables and figures  {folder.path}")
    return code if number is None else 128 + number


def _metrics(command: Metrics) -> int:
    from qlae.figures import plot_nmi
    from qlae.metrics.codes_file import read_codes
    from qlae.metrics.report import score_codes

    latents, sources, values = read_codes(command.file)
    if latents.dtype.kind == "f" and not command.continuous:
        raise UserError(
            f"{command.file}: latents are {latents.dtype}, not codes: give --continuous, or write integer indices"
        )
    try:
        report = score_codes(
            latents,
            sources,
            not command.continuous,
            values=None if command.continuous or command.protocol == "standalone" else values,
            protocol=command.protocol,
            explicitness=command.explicitness,
            held_out=command.held_out,
            neighbors=command.neighbors,
            iterations=command.iterations,
            seed=command.seed,
        )
    except ValueError as error:
        raise UserError(f"{command.file}: {error}") from error
    # Before the picture, so that a full disk costs no score.
    print(report.json() if command.json else report.table(), flush=True)
    path = command.output or command.file.with_name(f"{command.file.stem}-nmi.png")
    names = [f"source {number}" for number in range(len(report.infomec.nmi))]
    _write_picture(path, lambda file: plot_nmi(report.infomec, names, file))
    if not command.json:
        print(f"figure  {path}")
    return 0


def _write_picture(path: Path, draw: Callable[[Path], None]) -> None:
    """Has `draw` write the whole picture to `path`, or nothing."""
    temporary = path.with_name(f"{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(temporary)
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise UserError(f"cannot write {path} ({error.strerror}): give another --output") from error


def _data(command: Data) -> int:
    from qlae.data.prepare import list_datasets, prepare

    if command.action == "list":
        print(list_datasets(command.root))
        return 0
    if command.name is None:
        raise UserError(f"qlae data {command.action} needs the name of a data set; `qlae data list` lists them")
    if command.action == "prepare":
        print(prepare(command.name, command.root).describe())
        return 0
    return _show(command)


def _show(command: Data) -> int:
    from qlae.data import DATASETS, load_dataset
    from qlae.figures import plot_factors

    offered = DATASETS[command.name].resolutions if command.name in DATASETS else ()
    resolution = command.resolution or max(offered, default=None)
    dataset = load_dataset(command.name, resolution=resolution, root=command.root)
    if not dataset.factors:
        raise UserError(f"{command.name} has no known factors to vary: give a name that `qlae data list` lists")
    if command.image is not None and not 0 <= command.image < len(dataset):
        raise UserError(f"--image {command.image}: {dataset.name} has images 0 to {len(dataset) - 1}")
    path = command.output or Path(f"{dataset.name}-factors.png")
    _write_picture(path, lambda file: plot_factors(dataset, file, image=command.image))
    print(path)
    return 0


def _info() -> int:
    import platform

    import torch

    import qlae_kernels
    from qlae.methods import METHODS
    from qlae.networks import NETWORKS

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none that torch finds"
    backends = ", ".join(qlae_kernels.available_backends())
    lines = {
        "qlae": qlae_kernels.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu threads": str(torch.get_num_threads()),
        "gpu": gpu,
        "backends": f"{backends}  (python -m qlae_kernels says why others are not there)",
        "methods": ", ".join(METHODS),
        "networks": ", ".join(NETWORKS),
    }
    for name, value in lines.items():
        print(f"{name:<13}{value}")
    print("data sets")
    return _data(Data())


def score_table(evaluation: "Evaluation") -> str:
    """One score a line, with what it measures."""
    rows = []
    if evaluation.infomec is not None:
        scores = evaluation.infomec
        rows += [
            ("InfoM", f"{scores.infom:.3f}", "modularity: each latent tells one factor"),
            ("InfoC", f"{scores.infoc:.3f}", "compactness: each factor is told by one latent"),
            (
                "InfoE",
                f"{scores.infoe:.3f}",
                "explicitness: a linear model reads the factors off the latents",
            ),
        ]
    rows += [
        ("PSNR", f"{evaluation.psnr:.2f} dB", "reconstruction of the evaluation images"),
        (
            "active",
            f"{evaluation.active.sum()} of {len(evaluation.active)}",
            "latents that vary over the images",
        ),
    ]
    if evaluation.perplexity is not None:
        rows.append(("perplexity", f"{evaluation.perplexity.mean():.2f}", "codes in effective use, mean over latents"))
    return "\n".join(f"{name:<12}{value:<12}{meaning}" for name, value, meaning in rows)
