import numpy as np
import pytest
from sklearn.metrics import mutual_info_score

from qlae.metrics import mutual_information_gap

GENERATOR = np.random.default_rng(0)
SOURCES = GENERATOR.integers(0, (4, 3), (500, 2))


def literal_gap(codes: np.ndarray, sources: np.ndarray) -> float:
    gaps = []
    for source in sources.T:
        information = sorted(mutual_info_score(source, latent) for latent in codes.T)
        gaps.append((information[-1] - information[-2]) / mutual_info_score(source, source))
    return float(np.mean(gaps))


def test_codes_by_the_definition() -> None:
    codes = np.where(GENERATOR.random((500, 3)) < 0.6, SOURCES[:, [0, 1, 0]], GENERATOR.integers(0, 4, (500, 3)))
    assert mutual_information_gap(codes, SOURCES) == pytest.approx(literal_gap(codes, SOURCES), abs=1e-9)


@pytest.mark.parametrize("bins", [2, 20])
def test_continuous_latents_are_cut_into_equal_bins(bins: int) -> None:
    values = SOURCES[:, [0, 1, 0]] + GENERATOR.normal(size=(500, 3))
    parts = np.floor((values - values.min(axis=0)) / np.ptp(values, axis=0) * bins).clip(max=bins - 1).astype(int)
    score = mutual_information_gap(values, SOURCES, discrete=False, bins=bins)
    assert score == pytest.approx(literal_gap(parts, SOURCES), abs=1e-9)


def test_a_single_latent_has_no_second() -> None:
    score = mutual_information_gap(SOURCES[:, :1], SOURCES[:, :1])
    assert score == pytest.approx(1.0)


def test_too_few_bins_are_named() -> None:
    with pytest.raises(ValueError, match="bins must be at least 2, got 1"):
        mutual_information_gap(SOURCES * 1.0, SOURCES, discrete=False, bins=1)
