"""`usage` and `CodeUsage`: what was counted, over masks and batches. Over ranks: `test_distributed.py`."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch

from qlae_kernels import CodeUsage, FusedLatentQuantizer


def test_usage_by_hand() -> None:
    quantizer = FusedLatentQuantizer(3, [4, 2, 1])
    indices = torch.tensor([[0, 0, 0], [0, 1, 0], [2, 0, 0], [2, 1, 0]], dtype=torch.int32)
    usage = quantizer.usage(indices)
    assert isinstance(usage, CodeUsage)
    assert usage.counts.dtype is torch.int64
    assert usage.counts.tolist() == [[2, 0, 2, 0], [2, 2, 0, 0], [4, 0, 0, 0]]
    torch.testing.assert_close(usage.perplexity, torch.tensor([2.0, 2.0, 1.0], dtype=torch.float64))
    assert usage.dead.tolist() == [[False, True, False, True], [False] * 4, [False] * 4]
    # Frequencies 1/2, 1/4, 1/4: 2**(1/2 + 1/2 + 1/2) codes are in use.
    skewed = FusedLatentQuantizer(1, 3).usage(torch.tensor([[0], [0], [1], [2]]))
    torch.testing.assert_close(skewed.perplexity, torch.tensor([2.0**1.5], dtype=torch.float64))


def test_usage_of_any_layout_and_of_nothing() -> None:
    quantizer = FusedLatentQuantizer(3, 5)
    z = torch.randn(4, 3, 6, 7)
    indices = quantizer.encode(z)
    counts = quantizer.usage(indices).counts
    assert counts.sum(1).tolist() == [4 * 6 * 7] * 3
    flat = FusedLatentQuantizer(3, 5, channel_dim=-1)
    assert torch.equal(counts, flat.usage(indices.movedim(1, -1)).counts)
    usage = quantizer.usage(torch.zeros(0, 3, dtype=torch.int64))
    assert usage.counts.tolist() == [[0] * 5] * 3
    assert usage.perplexity.tolist() == [0.0] * 3
    assert usage.dead.all()


def test_a_mask_leaves_positions_out() -> None:
    quantizer = FusedLatentQuantizer(2, [3, 2])
    # [B, D, L]; what is masked need not be an index.
    indices = torch.tensor([[[0, 1, -1], [1, 1, 7]], [[2, 2, 0], [0, 0, 0]]])
    mask = torch.tensor([[True, True, False], [False, True, True]])
    usage = quantizer.usage(indices, mask)
    assert usage.counts.tolist() == [[2, 1, 1], [2, 2, 0]]
    # Frequencies 1/2, 1/4, 1/4 and 1/2, 1/2.
    torch.testing.assert_close(usage.perplexity, torch.tensor([2.0**1.5, 2.0], dtype=torch.float64))
    assert not usage.dead.any()
    assert quantizer.usage(indices, torch.zeros(2, 3, dtype=torch.bool)).perplexity.tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match=r"0\.\.levels - 1"):
        quantizer.usage(indices, torch.ones(2, 3, dtype=torch.bool))


def test_usage_refuses_a_mask_of_another_shape_or_dtype() -> None:
    quantizer = FusedLatentQuantizer(2, 3)
    indices = torch.zeros(4, 2, 5, dtype=torch.int64)
    for shape in ((4, 2, 5), (4,), (1, 5)):
        with pytest.raises(ValueError, match=r"\(4, 5\)"):
            quantizer.usage(indices, torch.ones(shape, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"bool.*float32"):
        quantizer.usage(indices, torch.ones(4, 5))


def test_the_sum_of_usages_is_the_usage_of_all_batches() -> None:
    quantizer = FusedLatentQuantizer(2, [3, 2])
    first = quantizer.usage(torch.tensor([[0, 0], [0, 0], [1, 0]]))
    second = quantizer.usage(torch.tensor([[0, 1]]))
    total = first + second
    assert isinstance(total, CodeUsage)
    assert total.counts.tolist() == [[3, 1, 0], [3, 1, 0]]
    assert total.dead.tolist() == [[False, False, True], [False, False, False]]
    expected = np.exp(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25)))
    np.testing.assert_allclose(total.perplexity.numpy(), [expected, expected])
    nothing = quantizer.usage(torch.zeros(0, 2, dtype=torch.int64))
    for got, want in zip(first + nothing, first, strict=True):
        assert torch.equal(got, want)
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(1, 3\)"):
        first + FusedLatentQuantizer(1, 3).usage(torch.zeros(1, 1, dtype=torch.int64))
    for other in (1, 0.5, "a"):
        with pytest.raises(TypeError):
            first + other
        with pytest.raises(TypeError):
            other + first


def test_sum_adds_the_usages_of_batches() -> None:
    quantizer = FusedLatentQuantizer(2, [3, 2])
    batches = torch.tensor([[[0, 0], [0, 0]], [[1, 0], [0, 1]], [[1, 1], [1, 1]]])
    total = sum(quantizer.usage(batch) for batch in batches)
    assert isinstance(total, CodeUsage)
    assert total.counts.tolist() == [[3, 3, 0], [3, 3, 0]]
    assert total.dead.tolist() == [[False, False, True], [False, False, False]]


class Usage(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.quantizer = FusedLatentQuantizer(2, [3, 2])

    def forward(self, indices: torch.Tensor) -> CodeUsage:
        return self.quantizer.usage(indices)


def test_a_saved_program_may_return_a_usage() -> None:
    indices = torch.tensor([[0, 0], [0, 1], [1, 1]])
    program = torch.export.export(Usage(), (indices,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    got = torch.export.load(file).module()(torch.cat([indices, indices]))
    assert isinstance(got, CodeUsage)
    assert got.counts.tolist() == [[4, 2, 0], [2, 4, 0]]


def test_what_was_saved_loads_with_weights_only() -> None:
    quantizer = FusedLatentQuantizer(2, [3, 2])
    output = quantizer(torch.randn(5, 2))
    output = type(output)(*(each.detach() for each in output))
    for value in (output, quantizer.usage(output.indices)):
        file = io.BytesIO()
        torch.save(value, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
        assert type(loaded) is type(value)
        for one, other in zip(loaded, value, strict=True):
            assert torch.equal(one, other)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_usage_may_be_vmapped() -> None:
    quantizer = FusedLatentQuantizer(2, [3, 2])
    indices = torch.tensor([[[0, 0], [0, 1]], [[2, 1], [2, 1]]])
    got = torch.vmap(quantizer.usage)(indices)
    assert isinstance(got, CodeUsage)
    assert got.counts.tolist() == [[[2, 0, 0], [1, 1, 0]], [[0, 0, 2], [0, 2, 0]]]
    torch.testing.assert_close(got.perplexity, torch.tensor([[1.0, 2.0], [1.0, 1.0]], dtype=torch.float64))
    assert got.dead.tolist() == [[[False, True, True], [False] * 3], [[True, True, False], [True, False, False]]]
