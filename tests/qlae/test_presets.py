"""The presets against the published protocol, written down here once more."""

from itertools import product

import pytest

from qlae.config import METHOD_OPTIONS, TrainConfig, check
from qlae.errors import UserError
from qlae.methods import METHODS, with_method_options
from qlae.presets import PRESETS, preset

DATA = ("rooms3d", "shapes3d", "mpi3d_toy", "mpi3d_complex", "falcor3d", "isaac3d", "some/folder")


@pytest.mark.parametrize(("name", "method", "data"), list(product(PRESETS, METHODS, DATA)))
def test_presets_can_be_run(name: str, method: str, data: str) -> None:
    config = preset(name, method, data)
    assert (config.method, config.data) == (method, data)
    check(with_method_options(config))


def test_the_default_preset_is_the_recorded_default_run() -> None:
    """As in benchmarks/results/default-run-2026-11-24."""
    config = with_method_options(preset("default"))
    assert config == TrainConfig(
        method="qlae",
        data="rooms3d",
        network="compact",
        steps=20_000,
        batch_size=64,
        learning_rate=2e-3,
        schedule="cosine",
        warmup_steps=0,
        weight_decay=0.4,
        gradient_clip=1.0,
        evaluation_every=2_500,
        levels=10,
        codebook="learned",
        quantization_weight=0.3,
        commitment_weight=0.3,
    )


@pytest.mark.parametrize("method", METHODS)
def test_what_the_papers_methods_have_in_common(method: str) -> None:
    config = preset("paper", method, "shapes3d")
    gan = "gan" in method
    expected = {
        "resolution": 64,
        "network": "paper",
        "steps": 200_000,
        "batch_size": 64 if gan else 128,
        "learning_rate": 2e-4 if gan else 1e-3,
        "schedule": "constant",
        "warmup_steps": 0,
        "gradient_clip": 1.0,
        "evaluation_every": 5_000,
    }
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("method", "option", "values"),
    [
        # on shapes3d, mpi3d_toy, falcor3d, isaac3d, rooms3d
        ("qlae", "weight_decay", (0.1, 0.001, 0.1, 0.1, 0.1)),
        ("qlinfowgan-gp", "weight_decay", (1e-3, 1e-3, 1e-4, 1e-3, 1e-3)),
        ("infowgan-gp", "weight_decay", (1e-4,) * 5),
        ("ae", "weight_decay", (0.0, 1e-3, 0.0, 0.0, 0.0)),
        ("vae", "weight_decay", (0.0,) * 5),
        ("tcvae", "weight_decay", (0.0,) * 5),
        ("bioae", "weight_decay", (1e-4,) * 5),
        ("vqvae", "weight_decay", (0.01,) * 5),
        ("vae", "beta", (3.0, 0.1, 10.0, 0.3, 3.0)),
        ("tcvae", "beta", (3.0, 0.3, 3.0, 1.0, 3.0)),
        ("bioae", "activity_weight", (0.01, 0.01, 0.01, 0.1, 0.01)),
    ],
)
def test_what_the_paper_sets_by_method_and_data(method: str, option: str, values: tuple[float, ...]) -> None:
    data = ("shapes3d", "mpi3d_toy", "falcor3d", "isaac3d", "rooms3d")
    found = [getattr(with_method_options(preset("paper", method, each)), option) for each in data]
    assert found == list(values)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("qlae", {"levels": 10, "codebook": "learned", "quantization_weight": 0.01, "commitment_weight": 0.01}),
        (
            "qlinfowgan-gp",
            {
                "levels": 10,
                "codebook": "learned",
                "quantization_weight": 0.01,
                "commitment_weight": 0.01,
                "critic_steps": 5,
                "gradient_penalty": 10.0,
                "latent_weight": 200.0,
            },
        ),
        ("infowgan-gp", {"critic_steps": 5, "gradient_penalty": 10.0, "latent_weight": 200.0}),
        ("ae", {}),
        ("vae", {"beta": 3.0}),
        ("tcvae", {"beta": 3.0}),
        ("bioae", {"nonnegativity_weight": 1.0, "activity_weight": 0.01}),
        ("vqvae", {"levels": 512, "quantization_weight": 1.0, "commitment_weight": 0.25}),
    ],
)
def test_the_papers_options_of_each_method_on_shapes3d(method: str, expected: dict[str, object]) -> None:
    config = with_method_options(preset("paper", method, "shapes3d"))
    assert {name: getattr(config, name) for name in METHOD_OPTIONS} == dict.fromkeys(METHOD_OPTIONS) | expected


def test_an_unknown_preset_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"'best'.*default, paper"):
        preset("best")
