"""The NMI matrices and all of InfoMEC at the size of an evaluation."""

from collections.abc import Callable

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture
from sklearn.feature_selection import mutual_info_classif
from sklearn.metrics import mutual_info_score

from qlae.metrics import infomec
from qlae.metrics.mutual_information import continuous_information, discrete_information, normalised
from qlae.metrics.samples import relabel

SAMPLES = 10_000


def make_codes(num_latents: int, num_sources: int, samples: int = SAMPLES) -> tuple[np.ndarray, np.ndarray]:
    """Latents [N, num_latents] and sources [N, num_sources]; a latent tells one source four times in five."""
    generator = np.random.default_rng(0)
    cardinalities = np.resize([10, 10, 10, 8, 4, 15], num_sources)
    sources = np.stack([generator.integers(0, size, samples) for size in cardinalities], axis=1)
    noise = generator.integers(0, 10, (samples, num_latents))
    kept = generator.random((samples, num_latents)) < 0.8
    latents = np.where(kept, sources[:, np.arange(num_latents) % num_sources] % 10, noise)
    return latents, sources


def vectorised(latents: np.ndarray, sources: np.ndarray) -> np.ndarray:
    labels = relabel(sources)
    return normalised(discrete_information(*relabel(latents), *labels), *labels)


def scikit_learn_loops(latents: np.ndarray, sources: np.ndarray) -> np.ndarray:
    rows = []
    for source in sources.T:
        entropy = mutual_info_score(source, source)
        rows.append([mutual_info_score(source, latent) / entropy for latent in latents.T])
    return np.array(rows)


@pytest.mark.parametrize("contender", [vectorised, scikit_learn_loops])
@pytest.mark.parametrize(("num_latents", "num_sources"), [(12, 6), (18, 9)])
@pytest.mark.benchmark(group="NMI matrix, 10,000 samples, latents x sources")
def test_nmi_matrix(
    benchmark: BenchmarkFixture, contender: Callable[..., np.ndarray], num_latents: int, num_sources: int
) -> None:
    latents, sources = make_codes(num_latents, num_sources)
    np.testing.assert_allclose(vectorised(latents, sources), scikit_learn_loops(latents, sources), atol=1e-10)
    benchmark(contender, latents, sources)


def make_values(num_latents: int, num_sources: int, samples: int = SAMPLES) -> tuple[np.ndarray, np.ndarray]:
    """The codes with noise of a third of their spacing, and the sources."""
    latents, sources = make_codes(num_latents, num_sources, samples)
    return latents + np.random.default_rng(1).normal(0, 0.3, latents.shape), sources


def sorted_neighbours(latents: np.ndarray, sources: np.ndarray) -> np.ndarray:
    labels = relabel(sources)
    return normalised(continuous_information(latents, *labels, neighbors=10, seed=0), *labels)


def scikit_learn_neighbours(latents: np.ndarray, sources: np.ndarray) -> np.ndarray:
    rows = []
    for source in sources.T:
        entropy = mutual_info_score(source, source)
        columns = [latent[:, None] for latent in latents.T]
        information = [mutual_info_classif(column, source, n_neighbors=10, random_state=0)[0] for column in columns]
        rows.append(np.array(information) / entropy)
    return np.array(rows)


@pytest.mark.parametrize("contender", [sorted_neighbours, scikit_learn_neighbours])
@pytest.mark.benchmark(group="NMI matrix of continuous latents, 10,000 samples x 12 latents x 6 sources")
def test_continuous_nmi_matrix(benchmark: BenchmarkFixture, contender: Callable[..., np.ndarray]) -> None:
    latents, sources = make_values(num_latents=12, num_sources=6)
    np.testing.assert_allclose(
        sorted_neighbours(latents, sources), scikit_learn_neighbours(latents, sources), atol=1e-6
    )
    benchmark.pedantic(contender, args=(latents, sources), rounds=3)


@pytest.mark.parametrize("samples", [SAMPLES, 10 * SAMPLES])
@pytest.mark.parametrize("discrete", [True, False], ids=["discrete", "continuous"])
@pytest.mark.benchmark(group="InfoMEC, 12 latents x 6 sources")
def test_infomec(benchmark: BenchmarkFixture, discrete: bool, samples: int) -> None:
    make = make_codes if discrete else make_values
    latents, sources = make(12, 6, samples)
    scores = benchmark.pedantic(infomec, args=(latents, sources, discrete), rounds=3)
    assert scores.active.all() and scores.infom > 0.9
