"""The two protocols: what is trained on, and what is scored."""

import torch

from qlae import config
from qlae.data.splits import SPLITS, held_out_split, reference_split


def test_both_score_the_same_images() -> None:
    assert torch.equal(reference_split(480_000)[1], held_out_split(480_000)[1])


def test_reference_trains_on_everything() -> None:
    assert torch.equal(reference_split(480_000)[0], torch.arange(480_000))


def test_the_configuration_knows_all() -> None:
    assert tuple(SPLITS) == config.SPLITS
    assert config.TrainConfig().split == "held-out"
