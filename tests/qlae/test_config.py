from dataclasses import fields, replace
from pathlib import Path

import pytest
import yaml

from qlae.config import TrainConfig, check, differences, from_plain, to_plain, to_yaml
from qlae.errors import UserError

FILE = Path("config.yaml")


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
        ({"steps": "ten"}, "config.yaml: steps is 'ten', which should be a whole number"),
        ({"beta": "big"}, "config.yaml: beta is 'big', which should be a number or empty"),
        ({"steps": True}, "config.yaml: steps is True"),
        ({"steps": None}, "config.yaml: steps is None"),
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
    del values["steps"]
    with pytest.raises(UserError, match="option 'steps' is missing"):
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
        {"levels": 0},
        {"critic_steps": 0},
        {"codebook": "random"},
        {"beta": -1.0},
        {"gradient_penalty": float("nan")},
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
