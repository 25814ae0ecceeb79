from functools import partial

import numpy as np
import pytest
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import mutual_info_score, roc_auc_score

from qlae.metrics import explicitness, modularity
from qlae.metrics.samples import split

GENERATOR = np.random.default_rng(0)
SOURCES = GENERATOR.integers(0, (2, 3, 4), (600, 3))
KEPT = GENERATOR.random((600, 4)) < 0.6
LATENTS = np.where(KEPT, SOURCES[:, [0, 1, 2, 0]], GENERATOR.integers(0, 4, (600, 4)))


def test_modularity_by_the_definition() -> None:
    scores = []
    for latent in LATENTS.T:
        squares = sorted(mutual_info_score(source, latent) ** 2 for source in SOURCES.T)
        scores.append(1 - sum(squares[:-1]) / squares[-1] / 2)
    assert modularity(LATENTS, SOURCES) == pytest.approx(np.mean(scores), abs=1e-9)


def test_a_latent_of_two_sources_is_not_modular() -> None:
    sources = np.repeat(np.indices((3, 3)).reshape(2, -1).T, 5, axis=0)
    both = sources[:, :1] * 3 + sources[:, 1:]
    assert modularity(both, sources) == pytest.approx(0.0, abs=1e-9)
    assert modularity(np.column_stack([both, sources]), sources) == pytest.approx(2 / 3, abs=1e-9)


def test_explicitness_by_the_definition() -> None:
    features = (LATENTS - LATENTS.mean(axis=0)) / LATENTS.std(axis=0)
    areas = []
    for labels in SOURCES.T:
        fitted, scored = split(labels, 1 / 3, seed=0)
        regression = LogisticRegression().fit(features[fitted], labels[fitted])
        probabilities = regression.predict_proba(features[scored])
        # One column a class, as a matrix of zeros and ones.
        areas.append(roc_auc_score(np.eye(labels.max() + 1)[labels[scored]], probabilities))
    assert explicitness(LATENTS, SOURCES) == pytest.approx(np.mean(areas), abs=1e-9)


def test_explicitness_without_two_classes_to_score_is_chance() -> None:
    # A third of two samples is none, so that one class alone is held out.
    sources = np.array([0] * 10 + [1, 1])[:, None]
    assert explicitness(sources, sources) == 0.5


def test_a_regression_that_does_not_converge_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "qlae.metrics.modularity_explicitness.LogisticRegression", partial(LogisticRegression, max_iter=1)
    )
    with pytest.warns(ConvergenceWarning, match="explicitness: 3 of 3 models had not converged"):
        explicitness(LATENTS, SOURCES)


@pytest.mark.parametrize("held_out", [0.0, 1.0])
def test_wrong_share_is_named(held_out: float) -> None:
    with pytest.raises(ValueError, match=r"held_out must be a share in \(0, 1\)"):
        explicitness(LATENTS, SOURCES, held_out=held_out)
