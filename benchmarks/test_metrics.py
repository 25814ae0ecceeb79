"""Each of the scores other than InfoMEC at the size of an evaluation and at ten times that, 12 latents x 6 sources."""

from collections.abc import Callable

import pytest
from pytest_benchmark.fixture import BenchmarkFixture
from test_infomec import SAMPLES, make_codes

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


@pytest.mark.parametrize("samples", [SAMPLES, 10 * SAMPLES])
@pytest.mark.parametrize("score", SCORES, ids=lambda score: score.__name__)
@pytest.mark.benchmark(group="other scores, 12 latents x 6 sources")
def test_score(benchmark: BenchmarkFixture, score: Callable[..., object], samples: int) -> None:
    benchmark.pedantic(score, args=make_codes(12, 6, samples), rounds=1, warmup_rounds=0)
