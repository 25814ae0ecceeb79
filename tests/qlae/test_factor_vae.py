import numpy as np
import pytest

from qlae.metrics import factor_vae

SOURCES = np.repeat(np.indices((4, 3)).reshape(2, -1).T, 20, axis=0)
QUICK = {"train_votes": 200, "test_votes": 200}


def test_a_latent_that_mixes_two_sources_costs_the_vote() -> None:
    mixed = SOURCES.sum(axis=1, keepdims=True)
    # One latent names one source, whichever was fixed: right half of the time.
    assert factor_vae(mixed, SOURCES, **QUICK) == pytest.approx(0.5, abs=0.12)
    # Beside a clean latent the mixed one, which halves its variance at most, is only the choice for the other source.
    assert factor_vae(np.column_stack([SOURCES[:, 0], mixed]), SOURCES, **QUICK) == pytest.approx(1.0)


def test_noise_within_a_value_is_compared_with_the_variance_over_all() -> None:
    generator = np.random.default_rng(0)
    # The noise is large, yet small beside the latent's own variance; the other latent is small, and random.
    latents = np.column_stack(
        [1000.0 * SOURCES + generator.normal(0, 10, SOURCES.shape), generator.normal(0, 1e-3, len(SOURCES))]
    )
    assert factor_vae(latents, SOURCES, **QUICK) == 1.0


@pytest.mark.parametrize("options", [{"group_size": 1}, {"train_votes": 0}, {"test_votes": 0}])
def test_wrong_sizes_are_named(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="group_size must be at least 2 and the votes at least 1"):
        factor_vae(SOURCES, SOURCES, **options)


def test_samples_that_share_no_value_are_named() -> None:
    with pytest.raises(ValueError, match="no two samples share a value"):
        factor_vae(SOURCES, np.arange(len(SOURCES))[:, None])
