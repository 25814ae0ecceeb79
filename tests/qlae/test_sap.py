import sys
from functools import partial

import numpy as np
import pytest
from sklearn.exceptions import ConvergenceWarning
from sklearn.svm import LinearSVC

from qlae.metrics import sap
from qlae.metrics.samples import split

GENERATOR = np.random.default_rng(0)
SOURCES = GENERATOR.integers(0, (2, 3), (600, 2))
LATENTS = SOURCES[:, [0, 1, 0]] + GENERATOR.normal(0, [0.1, 0.5, 1.0], (600, 3))


def test_accuracies_by_the_definition() -> None:
    gaps = []
    for labels in SOURCES.T:
        fitted, scored = split(labels, 1 / 3, seed=0)
        accuracies = []
        for latent in ((LATENTS - LATENTS.mean(axis=0)) / LATENTS.std(axis=0)).T:
            classifier = LinearSVC(C=0.01, class_weight="balanced", random_state=0)
            classifier.fit(latent[fitted, None], labels[fitted])
            accuracies.append(np.mean(classifier.predict(latent[scored, None]) == labels[scored]))
        gaps.append(sorted(accuracies)[-1] - sorted(accuracies)[-2])
    assert sap(LATENTS, SOURCES) == pytest.approx(np.mean(gaps), abs=1e-9)


def test_correlations_by_the_definition() -> None:
    squares = np.corrcoef(LATENTS.T, SOURCES.T)[:3, 3:] ** 2
    ascending = np.sort(squares, axis=0)
    score = sap(LATENTS, SOURCES, continuous_sources=True)
    assert score == pytest.approx((ascending[-1] - ascending[-2]).mean(), abs=1e-9)


def test_perfect_binary_codes_are_ahead_by_what_chance_leaves() -> None:
    sources = np.repeat(np.indices((2, 2)).reshape(2, -1).T, 60, axis=0)
    # The other latent is right half of the time, more or less in the third of the samples that is scored.
    assert sap(sources, sources) == pytest.approx(0.5, abs=0.1)
    assert sap(sources[:, [0, 0, 1, 1]], sources) == pytest.approx(0.0)


MOVES = {"place": (1.0, 100.0), "small": (0.01, 0.0), "large": (1e4, 0.0), "far": (1e20, 1e21), "turned": (-2.0, 5.0)}


@pytest.mark.parametrize(("scale", "place"), MOVES.values(), ids=MOVES)
def test_place_and_scale_of_perfect_codes_do_not_matter(scale: float, place: float) -> None:
    sources = np.repeat(np.indices((3, 2)).reshape(2, -1).T, 60, axis=0)
    # Right always, and by chance: (2/3 + 1/2) / 2.
    assert sap(sources * scale + place, sources) == pytest.approx(7 / 12, abs=0.1)


def test_a_machine_that_does_not_converge_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["qlae.metrics.sap"], "LinearSVC", partial(LinearSVC, max_iter=1))
    with pytest.warns(ConvergenceWarning, match="sap: 6 of 6 models had not converged at their last iteration"):
        sap(LATENTS, SOURCES)


@pytest.mark.parametrize("held_out", [0.0, 1.0, -0.1])
def test_wrong_share_is_named(held_out: float) -> None:
    with pytest.raises(ValueError, match=r"held_out must be a share in \(0, 1\)"):
        sap(LATENTS, SOURCES, held_out=held_out)
