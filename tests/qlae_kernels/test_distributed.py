"""The quantizer in two processes: DDP, FSDP2, and what ranks agree on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qlae_kernels import FusedLatentQuantizer

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="needs a PyTorch with torch.distributed and gloo",
)


@pytest.fixture(scope="module")
def all_results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    import two_ranks

    return two_ranks.run(tmp_path_factory.mktemp("two_ranks"))


@pytest.fixture
def results_of(all_results: dict[str, list[Any]]) -> Callable[[str], list[Any]]:
    """What both ranks returned in a scenario; fails with the error of a rank that raised one."""

    def results_of(name: str) -> list[Any]:
        errors = [result for result in all_results[name] if isinstance(result, str)]
        assert not errors, "\n".join(errors)
        return all_results[name]

    return results_of


def gradients_of(batch: Tensor) -> dict[str, Tensor]:
    """The gradients of one process."""
    import two_ranks

    model = two_ranks.Model("reference")
    model(batch).backward()
    return two_ranks.gradients(model)


def assert_all_close(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    assert "quantizer.codebook" in want
    assert want["quantizer.codebook"].abs().max() > 1e-3
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


def test_ddp_with_equal_batches_has_the_gradients_of_the_joined_batch(results_of) -> None:
    from two_ranks import images

    want = gradients_of(images(16))
    for by_backend in results_of("ddp_equal_batches"):
        for got in by_backend.values():
            assert_all_close(got, want)


def test_ddp_with_uneven_batches_weighs_ranks_alike_unless_the_loss_is_scaled(results_of) -> None:
    from two_ranks import images

    first, second = (gradients_of(batch) for batch in images(16).split([12, 4]))
    alike = {name: (first[name] + second[name]) / 2 for name in first}
    joined = gradients_of(images(16))
    codes = "quantizer.codebook"
    assert not torch.allclose(alike[codes], joined[codes], rtol=0.01)
    for plain, scaled in results_of("ddp_uneven_batches"):
        assert_all_close(plain, alike)
        assert_all_close(scaled, joined)


def test_ddp_with_masks_weighs_ranks_by_the_elements_that_count(results_of) -> None:
    from two_ranks import LEVELS, sequences_and_mask

    z, mask = sequences_and_mask()
    quantizer = FusedLatentQuantizer(3, LEVELS, channel_dim=-1, backend="reference")
    # The elements that count, alone.
    quantizer(z[mask]).loss.backward()
    assert quantizer.codebook.grad.abs().max() > 1e-4
    for got in results_of("ddp_masks"):
        torch.testing.assert_close(got, quantizer.codebook.grad, rtol=1e-5, atol=1e-8)


def test_join_carries_ddp_through_uneven_numbers_of_batches(results_of) -> None:
    from two_ranks import Model, images, parameters

    # A rank that has run out of batches counts as one with gradient 0.
    model = Model("reference")
    for batches in ((images(8, 1), images(8, 3)), (images(8, 2),)):
        model.zero_grad()
        sum(model(batch) for batch in batches).div(2).backward()
        with torch.no_grad():
            for each in model.parameters():
                each -= 0.5 * each.grad
    for got in results_of("ddp_uneven_steps"):
        assert_all_close(got, parameters(model))


def test_usage_counts_the_indices_of_all_ranks(results_of) -> None:
    first, second = results_of("usage")
    assert first["alone"][0].tolist() == [[2, 0, 0], [1, 1, 0]]
    assert second["alone"][0].tolist() == [[0, 3, 0], [1, 2, 0]]
    for result in (first, second):
        counts, perplexity, dead = result["together"]
        assert counts.tolist() == [[2, 3, 0], [2, 3, 0]]
        entropy = -(0.4 * np.log(0.4) + 0.6 * np.log(0.6))
        np.testing.assert_allclose(perplexity.numpy(), np.exp([entropy, entropy]))
        assert dead.tolist() == [[False, False, True], [False, False, False]]
        assert result["masked"][0].tolist() == [[1, 2, 0], [1, 2, 0]]


def joined_quantiles() -> np.ndarray:
    from two_ranks import LEVELS, latents_and_mask

    z, mask = (each.numpy() for each in latents_and_mask())
    codes = np.zeros((3, 5))
    for d, count in enumerate(LEVELS):
        column = z[mask, d].astype(np.float64)
        codes[d, :count] = np.quantile(column[np.isfinite(column)], (np.arange(count) + 0.5) / count)
    return codes


def test_codes_from_the_data_of_all_ranks(results_of) -> None:
    first, second = results_of("initialization")
    assert torch.equal(first, second)
    np.testing.assert_allclose(first.numpy(), joined_quantiles(), rtol=1e-6)


def test_codes_that_no_rank_used_are_revived_alike_from_the_data_of_all(results_of) -> None:
    first, second = results_of("revival")
    for revived, codes, alive, shared in (first, second):
        assert revived == 4
        # Codes 0 and 1 stay: each was used somewhere.
        torch.testing.assert_close(codes[0, :2], torch.linspace(-0.5, 0.5, 6)[:2])
        assert sorted(codes[0, 2:].tolist()) == [10.0, 11.0, 20.0, 21.0]
        assert alive == 1
        assert shared[0, :2].tolist() == [0.0, 1.0]
        assert shared[0, 2].item() in (0.25, 1.25)
    assert torch.equal(first[1], second[1])
    assert torch.equal(first[3], second[3])


def test_fsdp_trains_as_one_process_on_the_joined_batch(results_of) -> None:
    from two_ranks import Model, images, parameters

    model = Model("reference")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for seed in range(3):
        optimizer.zero_grad()
        model(images(16, seed)).backward()
        optimizer.step()
    for got in results_of("fsdp_training"):
        assert_all_close(got, parameters(model))


def test_fsdp_outside_forward_gathers_codes_and_refuses_gradients(results_of) -> None:
    from two_ranks import Model, images

    quantizer = Model("reference").quantizer
    z = images(7)[:, :3]
    indices = quantizer.encode(z)
    for got in results_of("fsdp_outside_forward"):
        assert got["type"] == "DTensor"
        assert torch.equal(got["encode"], indices)
        assert torch.equal(got["decode"], quantizer.decode(indices))
        assert torch.equal(got["forward"][0], quantizer.decode(indices))
        assert torch.equal(got["forward"][1], indices)
        assert torch.equal(got["sample"], quantizer.sample(9, torch.Generator().manual_seed(0)))
        assert torch.equal(got["usage"][0], quantizer.usage(indices).counts)
        for kind, text in got["refusals"]:
            assert kind == "RuntimeError"
            assert "sharded" in text
            assert "register_fsdp_forward_method" in text
            assert "no_grad" in text


def test_a_codebook_of_distribute_module_is_gathered_and_gets_no_gradient(results_of) -> None:
    from two_ranks import LEVELS, images

    for got in results_of("distributed_module"):
        assert torch.equal(got["indices"], FusedLatentQuantizer(3, LEVELS).encode(images(7)[:, :3]))
        kind, text = got["refusal"]
        assert kind == "RuntimeError"
        assert "distribute_module" in text
        assert "leave the quantizer out" in text


def test_fsdp_in_bfloat16_keeps_the_codes_of_a_quantizer_that_is_sharded_apart(results_of) -> None:
    for together, apart in results_of("fsdp_mixed_precision"):
        assert together == (torch.bfloat16, torch.bfloat16, torch.float32)
        assert apart == (torch.bfloat16, torch.float32, torch.float32)


def test_fsdp_averages_the_gradient_of_a_registered_method(results_of) -> None:
    # Latent 0 decodes code 0 on rank 0 and code 1 on rank 1, latent 1 code 2 on both.
    for got in results_of("fsdp_registered_method"):
        assert got.tolist() == [[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]


def test_fsdp_codes_are_set_by_all_ranks_together(results_of) -> None:
    from two_ranks import LEVELS

    first, second = results_of("fsdp_codes")
    for got in (first, second):
        assert torch.equal(got["reset"], FusedLatentQuantizer(3, LEVELS).codebook)
        for kind, text in got["refusals"]:
            assert kind == "ValueError"
            assert "group=torch.distributed.group.WORLD" in text
        np.testing.assert_allclose(got["initialized"].numpy(), joined_quantiles(), rtol=1e-6)
        # Of 3, 2 and 4 dead codes two each are revived: there are two values.
        assert got["revived"] == 6
        torch.testing.assert_close(got["codes"][:, 0], got["initialized"][:, 0])
        for latent, base in enumerate((100.0, 200.0, 300.0)):
            assert sorted(got["codes"][latent, 1:3].tolist()) == [base, base + 1]
        torch.testing.assert_close(got["codes"][:, 3:], got["initialized"][:, 3:])
        assert got["type"] == "DTensor"
    assert torch.equal(first["codes"], second["codes"])


def test_fsdp_checkpoints_hold_the_codes_and_their_levels(results_of) -> None:
    from two_ranks import LEVELS

    want = FusedLatentQuantizer(3, LEVELS).codebook.detach() + 3
    first, second = results_of("fsdp_checkpoint")
    for got in (first, second):
        torch.testing.assert_close(got["loaded"], want)
        torch.testing.assert_close(got["broadcast"], want)
        kind, text = got["refusal"]
        assert kind == "RuntimeError"
        assert "[4, 3, 5]" in text
        assert "[4, 5, 5]" in text
    assert {"quantizer.codebook", "quantizer._extra_state"} < set(first["keys"])
