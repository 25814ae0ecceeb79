"""`initialize_from` and `revive_dead_codes`. Over ranks: `test_distributed.py`."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from on_device import device_of
from torch import Tensor

from qlae_kernels import FusedLatentQuantizer

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def latents(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def quantiles(column: Tensor, count: int) -> np.ndarray:
    """The (k + 1/2) / count quantiles of the finite values, by NumPy."""
    values = column.double().numpy().ravel()
    return np.quantile(values[np.isfinite(values)], (np.arange(count) + 0.5) / count)


@pytest.mark.parametrize("learnable", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 2, 7, 1000])
def test_codes_start_at_the_quantiles_of_each_latent(n: int, dtype: torch.dtype, learnable: bool) -> None:
    z = latents(n, 3).to(dtype)
    levels = [4, 1, 7]
    quantizer = FusedLatentQuantizer(3, levels, learnable=learnable)
    quantizer.initialize_from(z)
    assert quantizer.codebook.dtype is torch.float32
    assert quantizer.codebook.requires_grad == learnable
    for latent, count in enumerate(levels):
        codes = quantizer.codebook.detach()[latent]
        np.testing.assert_allclose(codes[:count].numpy(), quantiles(z[:, latent], count), rtol=1e-6, atol=1e-7)
        assert (codes[count:] == 0).all()


def test_quantiles_by_hand() -> None:
    quantizer = FusedLatentQuantizer(1, 4)
    # Quantiles 1/8, 3/8, 5/8, 7/8 of 0 to 8.
    quantizer.initialize_from(torch.tensor([8.0, 0, 7, 1, 6, 2, 5, 3, 4]).unsqueeze(1))
    assert quantizer.codebook.tolist() == [[1.0, 3.0, 5.0, 7.0]]


def test_all_codes_are_in_use_after_a_start_from_skewed_data() -> None:
    z = latents(4096, 2).exp() * 1000
    quantizer = FusedLatentQuantizer(2, 16)
    assert quantizer.usage(quantizer.encode(z)).dead.sum() > 20
    quantizer.initialize_from(z)
    assert not quantizer.usage(quantizer.encode(z)).dead.any()


def test_a_shared_codebook_starts_at_the_quantiles_of_all_latents() -> None:
    z = latents(50, 3) * torch.tensor([1.0, 10.0, 100.0])
    quantizer = FusedLatentQuantizer(3, 5, shared_codebook=True)
    quantizer.initialize_from(z)
    np.testing.assert_allclose(quantizer.codebook.detach()[0].numpy(), quantiles(z, 5), rtol=1e-6)


@pytest.mark.parametrize("channel_dim", [1, -1])
def test_a_start_counts_what_the_mask_keeps_and_what_is_finite(channel_dim: int) -> None:
    z = latents(6, 2, 9)
    z[0, 0, 0], z[1, 1, 1], z[2, 0, 2] = torch.nan, torch.inf, -torch.inf
    mask = torch.rand(6, 9, generator=torch.Generator().manual_seed(1)) < 0.7
    z[:, 0][~mask] = 1e6
    quantizer = FusedLatentQuantizer(2, 5, channel_dim=channel_dim)
    quantizer.initialize_from(z if channel_dim == 1 else z.movedim(1, -1), mask)
    for latent in range(2):
        codes = quantizer.codebook.detach()[latent].numpy()
        np.testing.assert_allclose(codes, quantiles(z[:, latent][mask], 5), rtol=1e-6)


def test_a_half_codebook_leaves_out_what_it_cannot_hold() -> None:
    z = torch.tensor([[1.0], [2.0], [3.0], [1e30]])
    quantizer = FusedLatentQuantizer(1, 1, dtype=torch.float16)
    quantizer.initialize_from(z)
    assert quantizer.codebook.tolist() == [[2.0]]
    assert quantizer.codebook.dtype is torch.float16


def test_a_start_takes_more_than_16_million_values() -> None:
    n = (1 << 24) + 1
    z = torch.arange(n, dtype=torch.float32).view(-1, 1)
    quantizer = FusedLatentQuantizer(1, 2)
    quantizer.initialize_from(z)
    # float32 holds whole numbers up to 2**24.
    assert quantizer.codebook.tolist() == [[2.0**22, 3 * 2.0**22]]


def test_a_latent_without_a_value_is_an_error_and_leaves_the_codes() -> None:
    quantizer = FusedLatentQuantizer(3, 4)
    before = quantizer.codebook.detach().clone()
    z = latents(5, 3)
    z[:, 1] = torch.nan
    with pytest.raises(ValueError, match=r"none in latents \[1\]"):
        quantizer.initialize_from(z)
    with pytest.raises(ValueError, match=r"none in latents \[0, 1, 2\]"):
        quantizer.initialize_from(latents(5, 3), torch.zeros(5, dtype=torch.bool))
    assert torch.equal(quantizer.codebook, before)


@pytest.mark.parametrize("method", ["initialize_from", "revive_dead_codes"])
def test_wrong_latents_are_errors(method: str) -> None:
    call = getattr(FusedLatentQuantizer(3, 4), method)
    with pytest.raises(ValueError, match=r"3 latents.*\(5, 2\)"):
        call(latents(5, 2))
    with pytest.raises(TypeError, match="int64"):
        call(torch.zeros(5, 3, dtype=torch.int64))
    with pytest.raises(TypeError, match="list"):
        call([[0.0] * 3])
    with pytest.raises(ValueError, match=r"mask.*\(5,\).*\(5, 3\)"):
        call(latents(5, 3), mask=torch.ones(5, 3, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"mask.*float32"):
        call(latents(5, 3), mask=torch.ones(5))


def test_dead_codes_are_set_to_values_of_their_latent(backend: str) -> None:
    device = device_of(backend)
    quantizer = FusedLatentQuantizer(3, [5, 1, 4], init_range=(0.0, 4.0), backend=backend, device=device)
    # Latent 0 uses codes 0 and 4, latent 1 its only one, latent 2 codes 0 and 1 of 0, 4/3, 8/3, 4.
    z = torch.tensor([[0.1, 9.0, 0.2], [0.2, 9.0, 0.3], [3.9, 9.0, 1.3], [0.3, 9.0, 1.4], [0.4, 9.0, 1.2]])
    before = quantizer.codebook.detach().clone().cpu()
    generator = torch.Generator(device).manual_seed(0)
    assert quantizer.revive_dead_codes(z.to(device), generator=generator) == 5
    after = quantizer.codebook.detach().cpu()
    used = torch.tensor([[1, 0, 0, 0, 1], [1, 0, 0, 0, 0], [1, 1, 0, 0, 0]], dtype=torch.bool)
    assert torch.equal(after[used], before[used])
    for latent, dead in ((0, slice(1, 4)), (2, slice(2, 4))):
        drawn = after[latent, dead].tolist()
        assert set(drawn) <= set(z[:, latent].tolist())
        assert len(set(drawn)) == len(drawn)
    # Padding stays.
    assert torch.equal(after[1, 1:], before[1, 1:])
    assert after[2, 4] == before[2, 4]
    # A revived code equals a z, and so is in use; it can take all that used another.
    assert not quantizer.usage(quantizer.encode(z.to(device))).dead.cpu()[~used].any()


def test_the_draw_is_uniform_and_repeats_with_its_generator() -> None:
    z = torch.arange(10.0, 14.0).unsqueeze(1)
    seen = torch.zeros(4)
    for seed in range(400):
        twins = []
        for _ in range(2):
            quantizer = FusedLatentQuantizer(1, 3, channel_dim=-1)
            # Code 2 is the nearest to all; of the others two are dead.
            assert quantizer.revive_dead_codes(z, generator=torch.Generator().manual_seed(seed)) == 2
            twins.append(quantizer.codebook.detach())
        assert torch.equal(*twins)
        seen += torch.stack([(twins[0][0, :2] == value).sum() for value in z])
    # Each value is drawn half of the time: 200 of 400 times with a standard deviation of 10.
    assert ((seen - 200).abs() < 50).all()


def test_usage_says_which_codes_are_dead() -> None:
    quantizer = FusedLatentQuantizer(1, 3)
    seen = quantizer.usage(torch.tensor([[0]])) + quantizer.usage(torch.tensor([[1]]))
    # z alone would call codes 0 and 1 dead.
    assert quantizer.revive_dead_codes(torch.tensor([[7.0]]), seen) == 1
    assert quantizer.codebook.tolist() == [[-0.5, 0.0, 7.0]]
    with pytest.raises(ValueError, match=r"1 latents and up to 3 codes.*\(2, 3\)"):
        quantizer.revive_dead_codes(torch.tensor([[7.0]]), FusedLatentQuantizer(2, 3).usage(torch.tensor([[0, 0]])))


def test_nothing_that_is_masked_or_not_finite_is_drawn() -> None:
    quantizer = FusedLatentQuantizer(2, 4, init_range=(0.0, 3.0), dtype=torch.float16)
    # [B, D, L]. float16 holds no 1e6; latent 1 has nothing to draw.
    z = torch.tensor(
        [[[0.5, torch.nan, 5.0, torch.inf], [torch.nan] * 4], [[1e6, 6.0, 7.0, -torch.inf], [torch.inf] * 4]]
    )
    mask = torch.tensor([[True, True, False, True], [True, True, False, True]])
    used = quantizer.usage(torch.zeros(1, 2, dtype=torch.int64))
    # Three are dead, and two values may be drawn.
    assert quantizer.revive_dead_codes(z, used, mask) == 2
    assert quantizer.codebook[0, 0] == 0
    assert sorted(quantizer.codebook[0, 1:3].tolist()) == [0.5, 6.0]
    assert quantizer.codebook[0, 3] == 3
    assert quantizer.codebook[1].tolist() == [0.0, 1.0, 2.0, 3.0]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("masked", [True, False])
def test_latents_that_are_not_finite_use_no_code(bad: float, masked: bool) -> None:
    quantizer = FusedLatentQuantizer(2, 3, channel_dim=-1)
    # Latent 0 uses code 2 alone, latent 1 code 0 alone; the index of what is not finite is 0.
    z = torch.tensor([[[bad, -0.6], [0.6, bad]], [[0.7, -0.7], [0.8, -0.8]]])
    mask = torch.tensor([[True, True], [False, True]]) if masked else None
    assert quantizer.revive_dead_codes(z, mask=mask) == 4
    codes = quantizer.codebook.detach()
    assert codes[0, 2] == 0.5 and codes[1, 0] == -0.5
    assert set(codes[0, :2].tolist()) <= set(z[..., 0].flatten().tolist()) | {0.0}


def test_equal_values_revive_one_code() -> None:
    quantizer = FusedLatentQuantizer(1, 4)
    z = torch.full((3, 1), 9.0)
    # All use code 3; codes 1 and 2 would never be used beside a code 0 of 9.
    assert quantizer.revive_dead_codes(z) == 1
    assert quantizer.codebook[0, 0] == 9
    assert quantizer.codebook[0, 3] == 0.5
    before = quantizer.codebook.detach().clone()
    assert quantizer.revive_dead_codes(z) == 0
    assert torch.equal(quantizer.codebook, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_every_revived_code_is_in_use(dtype: torch.dtype) -> None:
    # Many equal values, some of which are codes, in an order of their own for each latent.
    generator = torch.Generator().manual_seed(0)
    z = torch.randint(-8, 8, (40, 3), generator=generator).to(dtype) / 4
    quantizer = FusedLatentQuantizer(3, [30, 20, 5], dtype=dtype)
    for _ in range(3):
        dead = quantizer.usage(quantizer.encode(z)).dead
        before = quantizer.codebook.detach().clone()
        revived = quantizer.revive_dead_codes(z, generator=generator)
        changed = quantizer.codebook.detach() != before
        assert changed.sum() == revived
        assert not (changed & ~dead).any()
        assert not (quantizer.usage(quantizer.encode(z)).dead & changed).any()
    # 16 values at most are different in a latent: there is nothing more to revive.
    assert revived == 0


def test_a_frequent_value_is_drawn_more_often() -> None:
    z = torch.tensor([9.0] * 3 + [7.0]).unsqueeze(1)
    used = FusedLatentQuantizer(1, 2).usage(torch.tensor([[0]]))
    drawn = []
    for seed in range(400):
        quantizer = FusedLatentQuantizer(1, 2)
        assert quantizer.revive_dead_codes(z, used, generator=torch.Generator().manual_seed(seed)) == 1
        drawn.append(quantizer.codebook[0, 1].item())
    # 300 of 400 times with a standard deviation of 9.
    assert abs(drawn.count(9.0) - 300) < 45


def test_a_shared_code_is_dead_where_no_latent_uses_it() -> None:
    quantizer = FusedLatentQuantizer(2, 3, shared_codebook=True, init_range=(0.0, 2.0))
    assert quantizer.revive_dead_codes(torch.tensor([[0.25, 1.25]])) == 1
    codes = quantizer.codebook[0].tolist()
    assert codes[:2] == [0.0, 1.0]
    assert codes[2] in (0.25, 1.25)


@pytest.mark.parametrize("n", [0, 3])
def test_a_batch_without_values_revives_nothing(n: int) -> None:
    quantizer = FusedLatentQuantizer(2, 3)
    before = quantizer.codebook.detach().clone()
    assert quantizer.revive_dead_codes(torch.full((n, 2), torch.nan)) == 0
    assert torch.equal(quantizer.codebook, before)


def test_fixed_codes_are_not_revived() -> None:
    quantizer = FusedLatentQuantizer(2, 3, learnable=False)
    with pytest.raises(RuntimeError, match=r"fixed.*learnable=False.*initialize_from"):
        quantizer.revive_dead_codes(latents(5, 2))


def test_adam_starts_a_revived_code_with_the_step_that_is_documented() -> None:
    quantizer = FusedLatentQuantizer(1, 2, quantization_weight=1.0)
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=1e-4)

    def step(z: Tensor) -> None:
        optimizer.zero_grad()
        quantizer(z).loss.backward()
        optimizer.step()

    for _ in range(5000):
        step(torch.tensor([[-0.6]]))
    assert quantizer.codebook[0, 1] == 0.5
    quantizer.revive_dead_codes(torch.tensor([[5.0]]), quantizer.usage(torch.tensor([[0]])))
    step(torch.tensor([[5.5]]))
    moved = quantizer.codebook[0, 1].item() - 5.0
    # (1 - 0.9) / sqrt(1 - 0.999) = 3.16; float32 near 5 is spaced by 4.8e-7, and the bias correction by beta2 at 5,001
    # steps lacks 0.7 %.
    assert moved == pytest.approx(1e-4 * 0.1 / 0.001**0.5, rel=0.02)
