import sys
from functools import partial

import numpy as np
import pytest
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from qlae.metrics import beta_vae

SOURCES = np.repeat(np.indices((4, 3)).reshape(2, -1).T, 20, axis=0)
QUICK = {"train_points": 300, "test_points": 200}


def test_rotated_latents_are_told_apart_as_well() -> None:
    """The score's known weakness: differences of any invertible mixture betray the source that pairs share."""
    wide = SOURCES * [1.0, 10.0]
    rotated = wide @ np.array([[0.8, 0.6], [-0.6, 0.8]])
    assert beta_vae(rotated, SOURCES, **QUICK) > 0.95


def test_a_source_that_no_latent_tells_is_still_told_by_elimination() -> None:
    latents = np.column_stack([SOURCES[:, 0], np.random.default_rng(0).integers(0, 9, len(SOURCES))])
    assert beta_vae(latents, SOURCES, **QUICK) > 0.95


def test_the_penalty_makes_the_scale_matter() -> None:
    # One pair a point leaves differences that overlap, and weights of about 1000 that the penalty forbids.
    options = QUICK | {"pairs": 1}
    assert beta_vae(SOURCES * 1e-4, SOURCES, **options) < beta_vae(SOURCES, SOURCES, **options)


def test_points_of_one_source_only_are_named() -> None:
    with pytest.raises(ValueError, match="beta_vae: train_points=1 drew points of one source only: give more"):
        beta_vae(SOURCES, SOURCES, train_points=1)


def test_a_regression_that_does_not_converge_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sys.modules["qlae.metrics.beta_vae"], "LogisticRegression", partial(LogisticRegression, max_iter=1)
    )
    with pytest.warns(ConvergenceWarning, match="beta_vae: 1 of 1 models had not converged"):
        beta_vae(SOURCES, SOURCES, **QUICK)


@pytest.mark.parametrize("options", [{"pairs": 0}, {"train_points": 0}, {"test_points": 0}])
def test_wrong_sizes_are_named(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="pairs and points must be at least 1"):
        beta_vae(SOURCES, SOURCES, **options)


def test_samples_that_share_no_value_are_named() -> None:
    sources = np.column_stack([np.arange(len(SOURCES)), SOURCES])
    with pytest.raises(ValueError, match="no two samples share a value of varying source 0"):
        beta_vae(SOURCES, sources)
