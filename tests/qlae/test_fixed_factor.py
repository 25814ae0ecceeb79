import numpy as np
import pytest

from qlae.metrics.fixed_factor import FixedFactorSampler

# Value 2 of the first source has a single sample.
LABELS = np.column_stack([[0, 0, 0, 0, 1, 1, 2], [0, 1, 2, 3, 0, 1, 2]])


def sampler() -> FixedFactorSampler:
    return FixedFactorSampler(LABELS, np.random.default_rng(0))


@pytest.mark.parametrize("source", [0, 1])
def test_groups_share_one_value_and_vary_otherwise(source: int) -> None:
    groups = sampler().groups(source, 500, 8)
    assert groups.shape == (500, 8)
    values = LABELS[groups]
    assert (values[:, :, source] == values[:, :1, source]).all()
    assert (np.ptp(values[:, :, 1 - source], axis=1) > 0).mean() > 0.9


@pytest.mark.parametrize("source", [0, 1])
def test_pairs_share_a_value_each(source: int) -> None:
    first, second = sampler().pairs(source, 500, 4)
    assert first.shape == second.shape == (500, 4)
    assert (LABELS[first, source] == LABELS[second, source]).all()
    assert (np.ptp(LABELS[first, source], axis=1) > 0).any()


def test_values_are_drawn_as_often_as_they_occur_and_single_samples_never() -> None:
    values = LABELS[sampler().groups(0, 6000, 1)[:, 0], 0]
    np.testing.assert_allclose(np.bincount(values, minlength=3) / 6000, [4 / 6, 2 / 6, 0], atol=0.03)
    within = np.bincount(sampler().groups(0, 6000, 1)[:, 0], minlength=7) / 6000
    np.testing.assert_allclose(within[:6], 1 / 6, atol=0.03)


def test_sources_are_drawn_evenly() -> None:
    np.testing.assert_allclose(np.bincount(sampler().sources(6000)) / 6000, 0.5, atol=0.03)


def test_samples_that_share_nothing_are_named() -> None:
    with pytest.raises(ValueError, match="no two samples share a value of varying source 1: give more samples"):
        FixedFactorSampler(np.column_stack([[0, 0, 1], [0, 1, 2]]), np.random.default_rng(0))
