from dataclasses import fields, replace
from pathlib import Path

import pytest
import yaml

from qlae.config import PRESETS, TrainConfig, check, differences, from_plain, preset, to_plain, to_yaml
from qlae.errors import UserError

FILE = Path("config.yaml")


@pytest.mark.parametrize("config", PRESETS.values(), ids=PRESETS)
def test_presets_can_be_run(config: TrainConfig) -> None:
    check(config)


def test_the_paper_preset_is_the_published_protocol() -> None:
    published = {
        "resolution": 64,
        "network": "paper",
        "steps": 200_000,
        "batch_size": 128,
        "learning_rate": 1e-3,
        "schedule": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.1,
        "gradient_clip": 1.0,
        "levels": 10,
        "quantization_weight": 0.01,
        "commitment_weight": 0.01,
        "evaluation_every": 5_000,
    }
    assert {name: getattr(PRESETS["paper"], name) for name in published} == published


def test_an_unknown_preset_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"'best'.*default, paper"):
        preset("best")


@pytest.mark.parametrize(
    "config",
    [TrainConfig(), TrainConfig(root=Path("/some/where"), num_latents=7, learning_rate=1e-5, weight_decay=0.0)],
)
def test_a_configuration_survives_its_file(config: TrainConfig) -> None:
    assert from_plain(yaml.safe_load(to_yaml(config)), FILE) == config


def test_a_whole_number_serves_as_a_number() -> None:
    assert from_plain(to_plain(TrainConfig()) | {"weight_decay": 1}, FILE).weight_decay == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"levls": 3}, "config.yaml: unknown option 'levls'"),
        ({"levels": "ten"}, "config.yaml: levels is 'ten', which should be a whole number"),
        ({"levels": True}, "config.yaml: levels is True"),
        ({"levels": None}, "config.yaml: levels is None"),
        ({"learning_rate": "fast"}, "config.yaml: learning_rate is 'fast', which should be a number"),
        ({"num_latents": 1.5}, "config.yaml: num_latents is 1.5, which should be a whole number or empty"),
        ({"levels": 0}, "config.yaml: --levels is 0, which should be at least 1"),
        ({"schedule": "linear"}, "config.yaml: --schedule is linear, which should be one of constant, cosine"),
    ],
)
def test_a_wrong_file_is_refused_by_name(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as caught:
        from_plain(to_plain(TrainConfig()) | changes, FILE)
    assert str(caught.value).startswith(message)


def test_a_missing_option_is_named() -> None:
    values = to_plain(TrainConfig())
    del values["levels"]
    with pytest.raises(UserError, match="option 'levels' is missing"):
        from_plain(values, FILE)


@pytest.mark.parametrize("values", [None, "text", [1, 2]])
def test_something_else_is_not_a_configuration(values: object) -> None:
    with pytest.raises(UserError, match="not a configuration"):
        from_plain(values, FILE)


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 0},
        {"batch_size": 0},
        {"evaluation_every": 0},
        {"num_latents": 0},
        {"resolution": -1},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"gradient_clip": float("inf")},
        {"weight_decay": -0.1},
        {"quantization_weight": float("inf")},
        {"warmup_steps": 11, "steps": 10},
        {"seed": -1},
        {"device": "tpu"},
    ],
)
def test_impossible_values_are_refused(changes: dict[str, object]) -> None:
    name = next(iter(changes))
    with pytest.raises(UserError, match="--" + name.replace("_", "-")):
        check(replace(TrainConfig(), **changes))


def test_differences_name_what_decides_the_result() -> None:
    other = replace(TrainConfig(), levels=4, steps=7, seed=3, device="cpu")
    assert differences(TrainConfig(), other) == ["levels", "seed"]
    assert differences(other, other) == []


def test_every_option_is_explained() -> None:
    import inspect

    source = inspect.getsource(TrainConfig)
    assert source.count('    """') >= len(fields(TrainConfig))
