import numpy as np
import pytest
import torch

from qlae.metrics import code_counts, perplexity

INDICES = np.array([[0, 0, 1], [1, 0, 1], [2, 0, 0], [3, 0, 1]])


def test_counts_show_dead_codes() -> None:
    counts = code_counts(INDICES, [4, 3, 2])
    assert [latent.tolist() for latent in counts] == [[1, 1, 1, 1], [4, 0, 0], [1, 3]]


def test_perplexity_by_hand() -> None:
    # Even use of four codes, one code only, and a quarter against three quarters.
    uneven = 4 / 3**0.75
    assert perplexity(INDICES, 4).tolist() == pytest.approx([4.0, 1.0, uneven])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_torch_indices(dtype: torch.dtype) -> None:
    indices = torch.as_tensor(INDICES, dtype=dtype)
    assert perplexity(indices, [4, 3, 2]).tolist() == perplexity(INDICES, [4, 3, 2]).tolist()


@pytest.mark.parametrize(
    ("indices", "levels", "message"),
    [
        (INDICES[0], 4, r"indices must have shape \[N, D\]"),
        (INDICES[:0], 4, r"indices must have shape \[N, D\] with N, D >= 1, got \[0, 3\]"),
        (INDICES.astype(float), 4, "indices must be integers, got float64"),
        (INDICES, [4, 3], r"one per latent \(3\), got 2"),
        (INDICES, [3, 3, 2], r"indices of latent 0 must be in \[0, 3\), got values from 0 to 3"),
        (-INDICES, 4, r"indices of latent 0 must be in \[0, 4\), got values from -3 to 0"),
    ],
)
def test_wrong_input_is_named(indices: np.ndarray, levels: int | list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        perplexity(indices, levels)
