import numpy as np
import pytest

from qlae.metrics import irs

GENERATOR = np.random.default_rng(0)
SOURCES = GENERATOR.integers(0, (2, 3), (300, 2))
LATENTS = SOURCES[:, [0, 1, 0]] * [1.0, 5.0, 2.0] + GENERATOR.normal(0, [0.1, 0.5, 1.0], (300, 3))


@pytest.mark.parametrize("quantile", [0.5, 0.99, 1.0])
def test_by_the_definition(quantile: float) -> None:
    robustness, weights = [], []
    for latent in LATENTS.T:
        largest = np.abs(latent - latent.mean()).max()
        of_source = []
        for source in SOURCES.T:
            groups = [latent[source == value] for value in np.unique(source)]
            deviations = [np.quantile(np.abs(group - group.mean()), quantile) for group in groups]
            of_source.append(1 - np.mean(deviations) / largest)
        robustness.append(max(of_source))
        weights.append(largest)
    expected = np.dot(robustness, weights) / np.sum(weights)
    assert irs(LATENTS, SOURCES, quantile=quantile) == pytest.approx(expected, abs=1e-9)


def test_values_with_one_sample_flatter() -> None:
    latents = GENERATOR.normal(size=(50, 3))
    assert irs(latents, np.arange(50)[:, None]) == 1.0


@pytest.mark.parametrize("quantile", [0.0, 1.1, float("nan")])
def test_wrong_quantile_is_named(quantile: float) -> None:
    with pytest.raises(ValueError, match=r"quantile must be in \(0, 1\]"):
        irs(LATENTS, SOURCES, quantile=quantile)
