"""The NMI matrix and all of InfoMEC at the size of an evaluation."""

from collections.abc import Callable

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture
from sklearn.metrics import mutual_info_score

from qlae.metrics import infomec
from qlae.metrics.mutual_information import discrete_information, normalised
from qlae.metrics.samples import relabel

SAMPLES = 10_000


def make_codes(num_latents: int, num_sources: int) -> tuple[np.ndarray, np.ndarray]:
    """Latents [N, num_latents] and sources [N, num_sources]; a latent tells one source four times in five."""
    generator = np.random.default_rng(0)
    cardinalities = np.resize([10, 10, 10, 8, 4, 15], num_sources)
    sources = np.stack([generator.integers(0, size, SAMPLES) for size in cardinalities], axis=1)
    noise = generator.integers(0, 10, (SAMPLES, num_latents))
    kept = generator.random((SAMPLES, num_latents)) < 0.8
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
@pytest.mark.benchmark(group="NMI matrix, 10,000 samples x 18 latents x 9 sources")
def test_nmi_matrix(benchmark: BenchmarkFixture, contender: Callable[..., np.ndarray]) -> None:
    latents, sources = make_codes(num_latents=18, num_sources=9)
    np.testing.assert_allclose(vectorised(latents, sources), scikit_learn_loops(latents, sources), atol=1e-10)
    benchmark(contender, latents, sources)


@pytest.mark.benchmark(group="InfoMEC, 10,000 samples x 12 latents x 6 sources")
def test_infomec(benchmark: BenchmarkFixture) -> None:
    latents, sources = make_codes(num_latents=12, num_sources=6)
    np.testing.assert_allclose(infomec(latents, sources).nmi, scikit_learn_loops(latents, sources), atol=1e-10)
    benchmark.pedantic(infomec, args=(latents, sources), rounds=3)
