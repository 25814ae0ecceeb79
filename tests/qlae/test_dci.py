import numpy as np
import pytest
from scipy.stats import entropy

from qlae.metrics import dci

GENERATOR = np.random.default_rng(0)
SOURCES = GENERATOR.integers(0, (5, 3), (600, 2))
FIRST = np.where(GENERATOR.random(600) < 0.98, SOURCES[:, 0], GENERATOR.integers(0, 5, 600))
LATENTS = np.column_stack([FIRST, SOURCES.sum(axis=1), GENERATOR.integers(0, 5, 600)])


def test_scores_follow_from_the_importances_by_the_definition() -> None:
    scores = dci(LATENTS, SOURCES, trees=20)
    assert scores.importance.shape == (2, 3)
    np.testing.assert_allclose(scores.importance.sum(axis=1), 1.0)
    # The first latent is wrong here and there, where the last one gains some importance.
    assert (scores.importance.sum(axis=0) > 0).all()
    columns = [1 - entropy(column, base=2) for column in scores.importance.T]
    weights = scores.importance.sum(axis=0) / scores.importance.sum()
    assert scores.disentanglement == pytest.approx(columns @ weights, abs=1e-9)
    assert scores.completeness == pytest.approx(np.mean([1 - entropy(row, base=3) for row in scores.importance]))


@pytest.mark.parametrize("model", ["random_forest", "tripod_forest", "gradient_boosting"])
def test_each_model_finds_the_latents_that_matter(model: str) -> None:
    scores = dci(LATENTS, SOURCES, model=model, trees=20)
    assert scores.importance[0].argmax() == 0
    assert (scores.importance[1, :2] > 0.2).all()
    assert scores.importance[:, 2].max() < 0.25
    assert scores.informativeness > 0.9


def test_a_forest_of_random_features_spreads_the_importance_of_perfect_codes() -> None:
    sources = GENERATOR.integers(0, 10, (1000, 6))
    spread, whole = (dci(sources, sources, model=model, trees=10) for model in ("tripod_forest", "random_forest"))
    assert spread.disentanglement < 0.9
    assert whole.disentanglement > 0.99


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "lasso"}, "model must be one of random_forest, tripod_forest, gradient_boosting, got 'lasso'"),
        ({"trees": 0}, "trees must be at least 1, got 0"),
        ({"held_out": 0.0}, r"held_out must be a share in \(0, 1\), got 0"),
        ({"held_out": 0.0001}, "leaves 0 to score"),
    ],
)
def test_wrong_options_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dci(LATENTS, SOURCES, **options)
