import numpy as np
import pytest

from qlae.metrics.samples import relabel, split


@pytest.mark.parametrize("held_out", [0.3, 0.5, 0.99])
def test_split_keeps_a_sample_of_every_class_to_fit(held_out: float) -> None:
    labels = np.repeat([0, 1, 2, 3], [1, 2, 10, 87])
    fitted, scored = split(labels, held_out, seed=0)
    assert sorted([*fitted, *scored]) == list(range(100))
    assert np.bincount(labels[scored], minlength=4).tolist() == [int(held_out * count) for count in (1, 2, 10, 87)]
    assert set(labels[fitted]) == {0, 1, 2, 3}


def test_split_without_a_share_is_in_sample() -> None:
    fitted, scored = split(np.array([0, 1, 1]), 0.0, seed=0)
    assert fitted.tolist() == scored.tolist() == [0, 1, 2]


def test_relabel_numbers_values_in_their_order() -> None:
    labels, sizes = relabel(np.array([[7, 0], [-2, 0], [2**62, 0], [7, 0]]))
    assert labels.tolist() == [[1, 0], [0, 0], [2, 0], [1, 0]]
    assert sizes.tolist() == [3, 1]
