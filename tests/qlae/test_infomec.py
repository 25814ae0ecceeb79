import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, mutual_info_score
from sklearn.preprocessing import OneHotEncoder

from qlae.metrics import infomec

# Separable regressions stop at scikit-learn's gradient tolerance of 1e-4, a little before a log loss of 0.
SEPARABLE = 2e-3


def grid(*sizes: int, repeats: int = 1) -> np.ndarray:
    """Every combination of sources of these sizes, so that all pairs are exactly independent."""
    combinations = np.indices(sizes).reshape(len(sizes), -1).T
    return np.repeat(combinations, repeats, axis=0)


def noisy_pair(samples: int = 400, num_latents: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Latents that partly tell sources of sizes 4, 3, 2, in every degree."""
    generator = np.random.default_rng(0)
    sources = np.stack([generator.integers(0, size, samples) for size in (4, 3, 2)], axis=1)
    noise = generator.integers(0, 5, (samples, num_latents))
    kept = generator.random((samples, num_latents)) < np.linspace(0.1, 0.9, num_latents)
    latents = np.where(kept, sources[:, np.arange(num_latents) % 3], noise)
    return latents, sources


def literal_infoe(latents: np.ndarray, sources: np.ndarray) -> float:
    """The definition in scikit-learn's own words, the regression from zeros included."""

    def entropy(features: np.ndarray, labels: np.ndarray) -> float:
        regression = LogisticRegression(C=np.inf, class_weight="balanced", solver="lbfgs", max_iter=100)
        return log_loss(labels, regression.fit(features, labels).predict_proba(features))

    features = OneHotEncoder(sparse_output=False).fit_transform(latents)
    scores = []
    for labels in sources.T:
        null = entropy(np.zeros_like(features), labels)
        scores.append((null - entropy(features, labels)) / null)
    return float(np.mean(scores))


def test_one_latent_per_source_scores_one() -> None:
    sources = grid(3, 4, 2)
    scores = infomec(sources, sources)
    np.testing.assert_allclose(scores.nmi, np.eye(3), atol=1e-12)
    assert scores.infom == pytest.approx(1.0)
    assert scores.infoc == pytest.approx(1.0)
    assert scores.infoe == pytest.approx(1.0, abs=SEPARABLE)
    assert scores.active.tolist() == [True, True, True]
    assert scores.varying.tolist() == [True, True, True]
    assert scores.converged is True


def test_rotated_pair_is_explicit_but_neither_modular_nor_compact() -> None:
    sources = grid(2, 2)
    first, second = sources.T
    scores = infomec(np.stack([first + second, first - second], axis=1), sources)
    # Half of the samples have the middle value, which leaves the whole of H(source) open.
    np.testing.assert_allclose(scores.nmi, np.full((2, 2), 0.5), atol=1e-12)
    assert scores.infom == pytest.approx(0.0, abs=1e-12)
    assert scores.infoc == pytest.approx(0.0, abs=1e-12)
    assert scores.infoe == pytest.approx(1.0, abs=SEPARABLE)


def test_duplicated_latents_cost_compactness_only() -> None:
    sources = grid(2, 2)
    scores = infomec(sources[:, [0, 0, 1]], sources)
    np.testing.assert_allclose(scores.nmi, [[1, 1, 0], [0, 0, 1]], atol=1e-12)
    assert scores.infom == pytest.approx(1.0)
    # ((1/2 + 1) / 2 - 1/3) / (1 - 1/3)
    assert scores.infoc == pytest.approx(0.625)
    assert scores.infoe == pytest.approx(1.0, abs=SEPARABLE)


def test_exclusive_or_informs_about_no_source() -> None:
    sources = grid(2, 2)
    first, second = sources.T
    scores = infomec(np.stack([first ^ second, first], axis=1), sources)
    np.testing.assert_allclose(scores.nmi, [[0, 1], [0, 0]], atol=1e-12)
    assert (scores.nmi[scores.nmi < 0.5] == 0).all()
    assert scores.infom == pytest.approx(0.5)
    assert scores.infoc == pytest.approx(0.5)
    # The first source is linear in the codes; the second is not, and is predicted evenly.
    assert scores.infoe == pytest.approx(0.5, abs=SEPARABLE)


def test_random_latents_score_near_zero() -> None:
    generator = np.random.default_rng(0)
    sources = generator.integers(0, 4, (4000, 3))
    scores = infomec(generator.integers(0, 4, (4000, 5)), sources)
    # Plug-in information of independent codes is (4 - 1)^2 / (2 N) nats on average.
    expected = 9 / (2 * 4000) / np.log(4)
    assert scores.nmi.mean() == pytest.approx(expected, rel=0.5)
    assert scores.nmi.max() < 4 * expected
    # In-sample: 15 free directions times 3 logits, each worth about 1 / (2 N) nats.
    assert 0 < scores.infoe < 2 * 45 / (2 * 4000) / np.log(4)


def test_dead_latent_is_inactive_and_counts_nowhere() -> None:
    latents, sources = noisy_pair()
    with_dead = np.insert(latents, 2, 7, axis=1)
    scores, expected = infomec(with_dead, sources), infomec(latents, sources)
    assert scores.active.tolist() == [True, True, False, True, True, True]
    assert (scores.nmi[:, 2] == 0).all()
    assert (scores.infom, scores.infoc, scores.infoe) == (expected.infom, expected.infoc, expected.infoe)


def test_constant_source_counts_nowhere() -> None:
    latents, sources = noisy_pair()
    with_constant = np.insert(sources, 1, 0, axis=1)
    scores, expected = infomec(latents, with_constant), infomec(latents, sources)
    assert scores.varying.tolist() == [True, False, True, True]
    assert (scores.nmi[1] == 0).all()
    assert (scores.infom, scores.infoc, scores.infoe) == (expected.infom, expected.infoc, expected.infoe)


def test_no_active_latent_scores_zero() -> None:
    scores = infomec(np.full((12, 3), 5), grid(3, 4))
    assert (scores.infom, scores.infoc, scores.infoe, scores.converged) == (0.0, 0.0, 0.0, True)
    assert not scores.active.any()
    assert scores.nmi.tolist() == np.zeros((2, 3)).tolist()


def test_no_varying_source_scores_zero() -> None:
    scores = infomec(grid(3, 4), np.full((12, 2), 5))
    assert (scores.infom, scores.infoc, scores.infoe, scores.converged) == (0.0, 0.0, 0.0, True)
    assert not scores.varying.any()
    assert scores.nmi.tolist() == np.zeros((2, 2)).tolist()


def test_one_active_latent_is_compact_for_the_sources_it_tells() -> None:
    sources = grid(3, 4)
    scores = infomec(sources[:, :1], sources)
    assert scores.infom == pytest.approx(1.0)
    # The first source is told by one latent only, the second by none.
    assert scores.infoc == pytest.approx(0.5)
    assert scores.infoe == pytest.approx(0.5, abs=SEPARABLE)


def test_one_source_is_modular_for_the_latents_that_inform() -> None:
    sources = grid(3, 4)
    scores = infomec(sources, sources[:, :1])
    assert scores.infom == pytest.approx(0.5)
    assert scores.infoc == pytest.approx(1.0)
    assert scores.infoe == pytest.approx(1.0, abs=SEPARABLE)


def test_one_latent_and_one_source() -> None:
    codes = grid(3)
    scores = infomec(codes, codes)
    assert (scores.infom, scores.infoc) == (pytest.approx(1.0), pytest.approx(1.0))


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    samples=st.integers(2, 40),
    num_latents=st.integers(1, 4),
    num_sources=st.integers(1, 3),
    cardinality=st.integers(1, 6),
)
def test_nmi_agrees_with_scikit_learn(
    seed: int, samples: int, num_latents: int, num_sources: int, cardinality: int
) -> None:
    generator = np.random.default_rng(seed)
    latents = generator.integers(0, cardinality, (samples, num_latents))
    sources = generator.integers(0, cardinality, (samples, num_sources))
    scores = infomec(latents, sources)
    for i, j in np.ndindex(num_sources, num_latents):
        entropy = mutual_info_score(sources[:, i], sources[:, i])
        information = mutual_info_score(sources[:, i], latents[:, j])
        assert scores.nmi[i, j] * entropy == pytest.approx(information, abs=1e-10)
    assert np.isfinite([scores.infom, scores.infoc, scores.infoe]).all()
    assert 0 <= scores.infom <= 1 + 1e-12
    assert 0 <= scores.infoc <= 1 + 1e-12


def test_infoe_agrees_with_the_literal_definition() -> None:
    latents, sources = noisy_pair()
    # A rare class, so that balancing matters.
    sources[:, 2] = np.arange(len(sources)) % 10 == 0
    scores = infomec(latents, sources)
    assert scores.converged is True
    assert scores.infoe == pytest.approx(literal_infoe(latents, sources), abs=1e-6)


def test_order_of_latents_sources_and_samples_does_not_matter() -> None:
    latents, sources = noisy_pair()
    scores = infomec(latents, sources)
    generator = np.random.default_rng(1)
    latent_order, source_order = generator.permutation(5), generator.permutation(3)
    sample_order = generator.permutation(len(latents))
    permuted = infomec(latents[sample_order][:, latent_order], sources[sample_order][:, source_order])
    np.testing.assert_allclose(permuted.nmi, scores.nmi[source_order][:, latent_order], atol=1e-12)
    assert permuted.infom == pytest.approx(scores.infom, abs=1e-12)
    assert permuted.infoc == pytest.approx(scores.infoc, abs=1e-12)
    assert permuted.infoe == pytest.approx(scores.infoe, abs=1e-4)


def test_names_of_codes_do_not_matter() -> None:
    latents, sources = noisy_pair()
    scores = infomec(latents, sources)
    names = np.array([2**62, -(2**62), 0, -7, 10**12])
    renamed = infomec(names[latents], np.array([3, -5, 2**40, 9])[sources])
    np.testing.assert_allclose(renamed.nmi, scores.nmi, atol=1e-12)
    assert renamed.infom == pytest.approx(scores.infom, abs=1e-12)
    assert renamed.infoc == pytest.approx(scores.infoc, abs=1e-12)
    assert renamed.infoe == pytest.approx(scores.infoe, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_torch_and_numpy_give_the_same_scores(dtype: torch.dtype) -> None:
    latents, sources = noisy_pair()
    expected = infomec(latents, sources)
    scores = infomec(torch.as_tensor(latents, dtype=dtype), torch.as_tensor(sources, dtype=dtype))
    assert scores.nmi.tolist() == expected.nmi.tolist()
    assert (scores.infom, scores.infoc, scores.infoe) == (expected.infom, expected.infoc, expected.infoe)


def test_whole_numbered_float_sources_are_taken() -> None:
    latents, sources = noisy_pair()
    assert infomec(latents, sources.astype(np.float64)).infoe == infomec(latents, sources).infoe


def test_unfinished_regression_is_reported_without_a_warning() -> None:
    generator = np.random.default_rng(0)
    sources = generator.integers(0, 10, (2000, 3))
    # Rotated sources, coarsely coded: best told by weights far out, which 100 iterations do not reach.
    latents = np.floor(sources / 9 @ generator.normal(size=(3, 6)) * 4).astype(np.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = infomec(latents, sources)
    assert scores.converged is False
    assert 0 < scores.infoe < 1


CODES = np.zeros((4, 2), dtype=np.int64)


@pytest.mark.parametrize(
    ("latents", "sources", "message"),
    [
        (CODES[:, 0], CODES, r"latents must have shape \[N, n_z\]"),
        (CODES, CODES[0], r"sources must have shape \[N, n_s\]"),
        (CODES[:, :0], CODES, r"latents must have shape \[N, n_z\] with n_z >= 1"),
        (CODES, CODES[:, :0], r"sources must have shape \[N, n_s\] with n_s >= 1"),
        (CODES, CODES[:3], "same length, got 4 and 3"),
        (CODES[:1], CODES[:1], "at least 2 samples, got 1"),
        (CODES[:0], CODES[:0], "at least 2 samples, got 0"),
        (CODES.astype(np.float32), CODES, "latents must be integer codes when discrete=True, got float32"),
        (np.full((4, 2), np.nan), CODES, "latents must be integer codes"),
        (torch.zeros(4, 2, dtype=torch.bfloat16), CODES, "latents must be integer codes"),
        (CODES, CODES + 0.5, "sources must be whole numbers, got float64"),
        (CODES, np.full((4, 2), np.nan), "sources must be whole numbers"),
        (CODES, np.full((4, 2), np.inf), "sources must be whole numbers"),
        (CODES, np.full((4, 2), "red"), "sources must be integers"),
    ],
)
def test_wrong_input_is_named(latents: np.ndarray, sources: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        infomec(latents, sources)


def test_continuous_latents_are_refused() -> None:
    with pytest.raises(ValueError, match="discrete latents only so far"):
        infomec(CODES.astype(np.float32), CODES, discrete=False)
