"""The configuration of a training run: one dataclass, its checks, and its file."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import yaml
from tyro.conf import Positional, arg

from qlae.errors import UserError
from qlae.method_options import OPTIONS


def without(meaning: str) -> Callable[[str], str]:
    """How `--help` shows a default: the value, or `meaning` where it is None."""
    return lambda default: f"(default: {meaning if default == 'None' else default})"


# how an option is shown that only some methods have
OWN = without("this method has none")

SPLITS = ("held-out", "reference")
SCHEDULES = ("constant", "cosine")
DEVICES = ("auto", "cpu", "cuda")
CODEBOOKS = ("learned", "global", "fixed")

# latents for data without known factors
DEFAULT_NUM_LATENTS = 12


@dataclass(frozen=True)
class TrainConfig:
    """What is trained on what, and how; together with the seed it decides the result."""

    method: Annotated[
        Positional[str], arg(metavar="[METHOD]", help=f"Training method: one of {', '.join(OPTIONS)}.")
    ] = "qlae"
    data: Annotated[str, arg(metavar="NAME|FOLDER")] = "rooms3d"
    """Data set by name (`qlae data` lists them), or a folder of your own images."""
    root: Annotated[Path | None, arg(metavar="FOLDER", help_behavior_hint=without("$QLAE_DATA, else data"))] = None
    """Where downloaded data files lie."""
    resolution: Annotated[int | None, arg(metavar="PIXELS", help_behavior_hint=without("the data set's own"))] = None
    """Height and width of the images."""
    split: Annotated[str, arg(metavar="{held-out,reference}")] = "held-out"
    """Images to train on: `held-out` leaves out those that are scored, `reference` takes all, as the publication's
    code does. The same images are scored either way."""
    network: Annotated[str, arg(metavar="{compact,compact-gan,small,paper}")] = "compact"
    """Encoder and decoder: `compact` for small images on a CPU, `compact-gan` the same for GANs, `paper` as
    published for 64 pixels, `small` its shallower variant."""
    num_latents: Annotated[
        int | None,
        arg(metavar="D", help_behavior_hint=without("twice the data's factors, 12 where there are none")),
    ] = None
    """Number of latents."""
    steps: Annotated[int, arg(metavar="N")] = 20_000
    """Training steps; those of a GAN are steps of the critic."""
    batch_size: Annotated[int, arg(metavar="N")] = 64
    """Images per step."""
    learning_rate: Annotated[float, arg(metavar="X")] = 2e-3
    """Step size of AdamW; a GAN has one AdamW for the critic and one for the generator."""
    schedule: Annotated[str, arg(metavar="{constant,cosine}")] = "cosine"
    """Learning rate over the steps: `constant`, or falling to 0 along half a `cosine`. With `cosine`, a resumed
    run with more --steps starts again at the rate that the longer curve has there."""
    warmup_steps: Annotated[int, arg(metavar="N")] = 0
    """Steps over which the learning rate first rises linearly."""
    weight_decay: Annotated[float, arg(metavar="X")] = 0.4
    """Decoupled weight decay: each step takes learning_rate * weight_decay of every weight. Biases and
    the codebook have none."""
    gradient_clip: Annotated[float, arg(metavar="X")] = 1.0
    """Bound on each element of the weights' gradients. Biases and the codebook have none."""
    levels: Annotated[int | None, arg(metavar="K", help_behavior_hint=OWN)] = None
    """Codes per latent (qlae, qlinfowgan-gp, fsq), or of the vector codebook that all latents share (vqvae)."""
    codebook: Annotated[str | None, arg(metavar="{learned,global,fixed}", help_behavior_hint=OWN)] = None
    """Values of the codes (qlae, qlinfowgan-gp): `learned` for each latent, a `global` learned set for all, or
    `fixed` ones."""
    quantization_weight: Annotated[float | None, arg(metavar="X", help_behavior_hint=OWN)] = None
    """Weight of the loss that draws codebook values to the latents (qlae, qlinfowgan-gp, vqvae)."""
    commitment_weight: Annotated[float | None, arg(metavar="X", help_behavior_hint=OWN)] = None
    """Weight of the loss that draws latents to their codebook values (qlae, qlinfowgan-gp, vqvae)."""
    beta: Annotated[float | None, arg(metavar="X", help_behavior_hint=OWN)] = None
    """Weight of the KL divergence (vae), or of its total correlation (tcvae)."""
    nonnegativity_weight: Annotated[float | None, arg(metavar="X", help_behavior_hint=OWN)] = None
    """Weight of the loss on negative latents (bioae)."""
    activity_weight: Annotated[float | None, arg(metavar="X", help_behavior_hint=OWN)] = None
    """Weight of the loss on the latents' squares (bioae)."""
    critic_steps: Annotated[int | None, arg(metavar="N", help_behavior_hint=OWN)] = None
    """Steps of the critic before each step of the generator (qlinfowgan-gp, infowgan-gp)."""
    gradient_penalty: Annotated[float | None, arg(metavar="X", help_behavior_hint=OWN)] = None
    """Weight of the penalty on the critic's gradient (qlinfowgan-gp, infowgan-gp)."""
    latent_weight: Annotated[float | None, arg(metavar="X", help_behavior_hint=OWN)] = None
    """Weight of the loss between drawn and inferred latents (qlinfowgan-gp, infowgan-gp)."""
    evaluation_every: Annotated[int, arg(metavar="N")] = 2_500
    """Steps between evaluations; each also writes a checkpoint."""
    seed: Annotated[int, arg(metavar="N")] = 0
    """Seed of the first weights and of the order of the images. The evaluation images do not depend on it."""
    device: Annotated[str, arg(metavar="{auto,cpu,cuda}")] = "auto"
    """Where to compute; `auto` takes the GPU where there is one."""


# what only some methods have; None leaves it to the method, or says that it has no such option
METHOD_OPTIONS = tuple(dict.fromkeys(name for own in OPTIONS.values() for name in own))

WEIGHTS = tuple(name for name in METHOD_OPTIONS if name not in ("levels", "codebook", "critic_steps"))

# a resumed run may change these; the same weights come out, or more steps follow
RESUMABLE_CHANGES = frozenset({"steps", "device", "root", "evaluation_every"})


def check(config: TrainConfig) -> None:
    """Raises UserError for the first value that no run can have."""
    for name in ("steps", "batch_size", "evaluation_every", "num_latents", "resolution", "levels", "critic_steps"):
        value = getattr(config, name)
        _require(config, name, value is None or value >= 1, "at least 1")
    for name in ("learning_rate", "gradient_clip"):
        value = getattr(config, name)
        _require(config, name, math.isfinite(value) and value > 0, "a positive number")
    for name in ("weight_decay", *WEIGHTS):
        value = getattr(config, name)
        _require(config, name, value is None or (math.isfinite(value) and value >= 0), "0 or more")
    _require(config, "codebook", config.codebook in (None, *CODEBOOKS), f"one of {', '.join(CODEBOOKS)}")
    _require(config, "warmup_steps", 0 <= config.warmup_steps <= config.steps, "between 0 and --steps")
    _require(config, "seed", 0 <= config.seed < 2**63, "between 0 and 2**63 - 1")
    _require(config, "split", config.split in SPLITS, f"one of {', '.join(SPLITS)}")
    _require(config, "schedule", config.schedule in SCHEDULES, f"one of {', '.join(SCHEDULES)}")
    _require(config, "device", config.device in DEVICES, f"one of {', '.join(DEVICES)}")


def with_method_options(config: TrainConfig) -> TrainConfig:
    """The configuration with the method's own value for each of its options that has none.

    Raises:
        UserError: for an unknown method, and for an option that is another method's.
    """
    if config.method not in OPTIONS:
        raise UserError(f"unknown method {config.method!r}: choose one of {', '.join(OPTIONS)}")
    own = OPTIONS[config.method]
    for name in METHOD_OPTIONS:
        value = getattr(config, name)
        if value is not None and name not in own:
            users = ", ".join(method for method, options in OPTIONS.items() if name in options)
            raise UserError(
                f"{option(name)} {value}: the method {config.method} has no such option, leave it out; "
                f"methods that have it: {users}"
            )
    return replace(config, **{name: value for name, value in own.items() if getattr(config, name) is None})


def differences(old: TrainConfig, new: TrainConfig) -> list[str]:
    """Names of the options that differ and decide the result, in the order of the fields."""
    return [
        field.name
        for field in fields(TrainConfig)
        if field.name not in RESUMABLE_CHANGES and getattr(old, field.name) != getattr(new, field.name)
    ]


def option(name: str) -> str:
    """How a field is typed on the command line."""
    return "METHOD" if name == "method" else "--" + name.replace("_", "-")


def to_yaml(config: TrainConfig) -> str:
    """One line per field, in the order of the fields."""
    return yaml.safe_dump(to_plain(config), sort_keys=False)


def to_plain(config: TrainConfig) -> dict[str, Any]:
    """The fields as strings, numbers and None."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(config).items()}


def from_plain(values: object, origin: Path | str) -> TrainConfig:
    """The inverse of `to_plain`.

    Args:
        values: what was read.
        origin: the file it was read from, or the place in it, to be named in errors.

    Raises:
        UserError: for fields that are missing or unknown, and for values of another type or range.
    """
    if not isinstance(values, dict):
        raise UserError(f"{origin}: not a configuration, which has one 'option: value' a line")
    types = get_type_hints(TrainConfig)
    unknown = [str(name) for name in values if name not in types]
    missing = [name for name in types if name not in values]
    if unknown:
        raise UserError(f"{origin}: unknown option {unknown[0]!r}: remove it, or correct its name")
    if missing:
        raise UserError(f"{origin}: option {missing[0]!r} is missing: add it, or train the run again")
    for name, value in values.items():
        if not _has_type(value, types[name]):
            raise UserError(f"{origin}: {name} is {value!r}, which should be {_type_name(types[name])}")
    if values["root"] is not None:
        values = values | {"root": Path(values["root"])}
    config = TrainConfig(**values)
    try:
        check(config)
    except UserError as error:
        raise UserError(f"{origin}: {error}") from error
    return config


def _require(config: TrainConfig, name: str, holds: bool, wanted: str) -> None:
    if not holds:
        raise UserError(f"{option(name)} is {getattr(config, name)}, which should be {wanted}")


def _plain_types(annotation: Any) -> tuple[type, ...]:
    if get_origin(annotation) is Annotated:
        return _plain_types(get_args(annotation)[0])
    types = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    return tuple(str if kind is Path else kind for kind in types)


def _has_type(value: object, annotation: Any) -> bool:
    types = _plain_types(annotation)
    if float in types:
        types = (*types, int)
    return isinstance(value, types) and not isinstance(value, bool)


def _type_name(annotation: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "text", NoneType: "empty"}
    return " or ".join(names[kind] for kind in _plain_types(annotation))
