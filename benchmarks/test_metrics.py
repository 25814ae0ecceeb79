"""Each of the scores other than InfoMEC at the size of an evaluation, 10,000 samples x 12 latents x 6 sources."""

from collections.abc import Callable

import pytest
from pytest_benchmark.fixture import BenchmarkFixture
from test_infomec import make_codes

from qlae.metrics import (
    beta_vae,
    dci,
    explicitness,
    factor_vae,
    irs,
    modularity,
    mutual_information_gap,
    other_scores,
    sap,
)

SCORES = [beta_vae, dci, explicitness, factor_vae, irs, modularity, mutual_information_gap, other_scores, sap]


@pytest.mark.parametrize("score", SCORES, ids=lambda score: score.__name__)
@pytest.mark.benchmark(group="other scores, 10,000 samples x 12 latents x 6 sources")
def test_score(benchmark: BenchmarkFixture, score: Callable[..., object]) -> None:
    benchmark.pedantic(score, args=make_codes(num_latents=12, num_sources=6), rounds=1, warmup_rounds=0)
