import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from qlae.metrics import ScoreAccumulator, all_scores, infomec, mutual_information_gap

GENERATOR = np.random.default_rng(0)
SOURCES = GENERATOR.integers(0, (4, 3), (90, 2))
LATENTS = np.where(GENERATOR.random((90, 3)) < 0.7, SOURCES[:, [0, 1, 0]], GENERATOR.integers(0, 4, (90, 3)))


def test_batches_score_as_all_samples_together() -> None:
    accumulator = ScoreAccumulator(infomec)
    # One buffer for all batches: what is kept has to be a copy.
    buffer = torch.empty(40, 3, dtype=torch.int32)
    for start in range(0, 90, 40):
        batch = torch.as_tensor(LATENTS[start : start + 40])
        buffer[: len(batch)] = batch
        accumulator.update(buffer[: len(batch)], SOURCES[start : start + 40])
    scores, expected = accumulator.compute(), infomec(LATENTS, SOURCES)
    assert scores.nmi.tolist() == expected.nmi.tolist()
    assert (scores.infom, scores.infoc, scores.infoe) == (expected.infom, expected.infoc, expected.infoe)


def test_options_reach_the_score() -> None:
    values = torch.as_tensor(LATENTS).bfloat16()
    accumulator = ScoreAccumulator(mutual_information_gap, discrete=False, bins=3)
    accumulator.update(values, SOURCES)
    assert accumulator.compute() == mutual_information_gap(values, SOURCES, discrete=False, bins=3)


def test_all_scores_can_be_accumulated() -> None:
    accumulator = ScoreAccumulator(all_scores, seed=3)
    accumulator.update(LATENTS, SOURCES)
    assert accumulator.compute() == all_scores(LATENTS, SOURCES, seed=3)


def test_reset_forgets_and_takes_other_columns() -> None:
    accumulator = ScoreAccumulator(mutual_information_gap)
    accumulator.update(LATENTS, SOURCES)
    accumulator.reset()
    with pytest.raises(ValueError, match="nothing to score: call update before compute"):
        accumulator.compute()
    accumulator.update(LATENTS[:, :2], SOURCES[:, :1])
    assert accumulator.compute() == mutual_information_gap(LATENTS[:, :2], SOURCES[:, :1])


@pytest.mark.parametrize(
    ("latents", "sources", "message"),
    [
        (LATENTS[0], SOURCES, r"latents must have shape \[N, n_z\]"),
        (LATENTS[:5], SOURCES[:4], "same length, got 5 and 4"),
        (LATENTS[:, :2], SOURCES, "latents had 3 columns before, got 2: call reset first"),
        (LATENTS, SOURCES[:, :1], "sources had 2 columns before, got 1: call reset first"),
    ],
)
def test_wrong_batch_is_named_and_not_kept(latents: np.ndarray, sources: np.ndarray, message: str) -> None:
    accumulator = ScoreAccumulator(mutual_information_gap)
    accumulator.update(LATENTS, SOURCES)
    with pytest.raises(ValueError, match=message):
        accumulator.update(latents, sources)
    assert accumulator.compute() == mutual_information_gap(LATENTS, SOURCES)


RANK = """
import sys
import numpy as np
from torch import distributed
from qlae.metrics import ScoreAccumulator, infomec

rank, store, data = int(sys.argv[1]), sys.argv[2], np.load(sys.argv[3])
distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
accumulator = ScoreAccumulator(infomec)
share = [slice(0, 40), slice(40, None)][rank]
latents, sources = data["latents"][share], data["sources"][share]
for start in range(0, len(latents), 16):
    accumulator.update(latents[start : start + 16], sources[start : start + 16])
scores = accumulator.compute()
accumulator.reset()
if rank == 1:
    accumulator.update(latents, sources)
alone = accumulator.compute()
np.savez(f"{store}-{rank}.npz", nmi=scores.nmi, infoe=scores.infoe, alone=alone.nmi)
distributed.destroy_process_group()
"""


def test_two_ranks_score_the_samples_of_both(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", latents=LATENTS, sources=SOURCES)
    command = [sys.executable, "-P", "-c", RANK]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    store, data = tmp_path / "store", tmp_path / "data.npz"
    ranks = [subprocess.Popen([*command, str(rank), str(store), str(data)], env=environment) for rank in (0, 1)]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    expected, alone = infomec(LATENTS, SOURCES), infomec(LATENTS[40:], SOURCES[40:])
    for rank in (0, 1):
        scores = np.load(f"{store}-{rank}.npz")
        assert scores["nmi"].tolist() == expected.nmi.tolist()
        assert scores["infoe"] == expected.infoe
        # A rank without samples takes part all the same.
        assert scores["alone"].tolist() == alone.nmi.tolist()
