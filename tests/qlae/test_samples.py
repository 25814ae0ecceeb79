import numpy as np
import pytest

from qlae.metrics.samples import relabel, split, values_of


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


EXTREMES = {
    "small": np.array([7, -2, 9, 7]),
    "wide": np.array([7, -2, 2**62, 7]),
    "int8": np.array([127, -128, 0, 127], dtype=np.int8),
    "uint64": np.array([2**64 - 1, 2**64 - 3, 5, 2**64 - 1], dtype=np.uint64),
    "large uint64": np.array([2**64 - 1, 2**64 - 3, 2**64 - 2, 2**64 - 1], dtype=np.uint64),
    "bool": np.array([True, False, True, True]),
    "float": np.array([0.0, 3.0, -1e300, 0.0]),
}


@pytest.mark.parametrize("codes", EXTREMES.values(), ids=EXTREMES)
def test_relabel_numbers_values_in_their_order(codes: np.ndarray) -> None:
    labels, sizes = relabel(np.column_stack([codes, np.zeros_like(codes)]))
    values, expected = np.unique(codes, return_inverse=True)
    assert labels[:, 0].tolist() == expected.tolist()
    assert labels[:, 1].tolist() == [0] * 4
    assert sizes.tolist() == [len(values), 1]


@pytest.mark.parametrize("codes", EXTREMES.values(), ids=EXTREMES)
def test_values_are_exact_differences_from_the_least(codes: np.ndarray) -> None:
    codes = codes if codes.dtype.kind != "f" else codes.clip(-1e30, None)
    # Python's integers have no limit.
    exact = [float(int(code) - int(codes.min())) for code in codes]
    assert values_of(codes[:, None])[:, 0].tolist() == exact
