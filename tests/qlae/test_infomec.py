import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import trapezoid
from scipy.special import digamma
from scipy.stats import norm
from sklearn.feature_selection import mutual_info_classif
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, mutual_info_score
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from qlae.metrics import active_latents, infomec

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


def test_infom_and_infoc_agree_with_the_published_formulas() -> None:
    latents, sources = noisy_pair()
    rows = []
    for source in sources.T:
        entropy = mutual_info_score(source, source)
        rows.append([mutual_info_score(source, latent) / entropy for latent in latents.T])
    nmi = np.array(rows)
    scores = infomec(latents, sources)
    modularity = (np.mean(nmi.max(axis=0) / nmi.sum(axis=0)) - 1 / 3) / (1 - 1 / 3)
    compactness = (np.mean(nmi.max(axis=1) / nmi.sum(axis=1)) - 1 / 5) / (1 - 1 / 5)
    assert scores.infom == pytest.approx(modularity, abs=1e-9)
    assert scores.infoc == pytest.approx(compactness, abs=1e-9)


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


def test_a_source_of_many_values_does_not_warn() -> None:
    sources = np.arange(40)[:, None]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert infomec(sources // 2, sources).infoe > 0.5


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


def noisy_values(samples: int = 1500) -> tuple[np.ndarray, np.ndarray]:
    """Continuous latents that tell sources of sizes 4, 3, 2 well, badly and not at all."""
    generator = np.random.default_rng(0)
    sources = np.stack([generator.integers(0, size, samples) for size in (4, 3, 2)], axis=1)
    noise = generator.normal(size=(samples, 4))
    return sources[:, [0, 1, 2, 0]] * [1.0, 2.0, 0.5, 0.0] + noise * [0.1, 1.0, 1.0, 1.0], sources


def scikit_learn_nmi(latents: np.ndarray, sources: np.ndarray, neighbors: int = 10) -> np.ndarray:
    rows = []
    for source in sources.T:
        information = mutual_info_classif(latents, source, n_neighbors=neighbors, random_state=0)
        rows.append(information / mutual_info_score(source, source))
    return np.array(rows)


@pytest.mark.parametrize("neighbors", [1, 3, 10])
def test_continuous_nmi_agrees_with_scikit_learn(neighbors: int) -> None:
    latents, sources = noisy_values()
    scores = infomec(latents, sources, discrete=False, neighbors=neighbors)
    np.testing.assert_allclose(scores.nmi, scikit_learn_nmi(latents, sources, neighbors), atol=1e-9)


def literal_ross(values: np.ndarray, labels: np.ndarray, neighbors: int) -> float:
    """The estimator sample by sample, from all distances; classes of one sample are left out."""
    _, inverse, counts = np.unique(labels, return_inverse=True, return_counts=True)
    kept = counts[inverse] > 1
    values, labels = values[kept], labels[kept]
    terms = []
    for value, label in zip(values, labels, strict=True):
        own = np.sort(np.abs(values[labels == label] - value))
        k = min(neighbors, len(own) - 1)
        nearer = np.count_nonzero(np.abs(values - value) < own[k])
        terms.append(digamma(k) - digamma(len(own)) - digamma(nearer))
    return max(0.0, digamma(len(values)) + np.mean(terms))


def test_small_and_single_classes() -> None:
    generator = np.random.default_rng(0)
    # Four samples of class 1, two of class 2, and one each of classes 3 and 4. scikit-learn finds the neighbours
    # of such classes by rounded squares and takes the k-th for a nearer one here and there.
    sources = np.array([0] * 92 + [1] * 4 + [2] * 2 + [3, 4])[:, None]
    latents = generator.normal(size=(100, 3)) + [1.0, 0.2, 0.0] * sources
    scores = infomec(latents, sources, discrete=False)
    entropy = mutual_info_score(sources[:, 0], sources[:, 0])
    expected = [literal_ross(latent, sources[:, 0], 10) / entropy for latent in latents.T]
    np.testing.assert_allclose(scores.nmi[0], expected, atol=1e-9)


def test_continuous_scores_by_the_published_formulas() -> None:
    latents, sources = noisy_values()
    latents[:, 2] /= 1000
    scores = infomec(latents, sources, discrete=False)
    # Latent 2 has a small range and is not active; the regression sees it all the same.
    assert scores.active.tolist() == [True, True, False, True]
    nmi = scikit_learn_nmi(latents, sources)[:, [0, 1, 3]]
    modularity = (np.mean(nmi.max(axis=0) / nmi.sum(axis=0)) - 1 / 3) / (1 - 1 / 3)
    compactness = (np.mean(nmi.max(axis=1) / nmi.sum(axis=1)) - 1 / 3) / (1 - 1 / 3)
    assert scores.infom == pytest.approx(modularity, abs=1e-6)
    assert scores.infoc == pytest.approx(compactness, abs=1e-6)
    regressions = []
    for labels in sources.T:
        regression = LogisticRegression(C=np.inf, class_weight="balanced", max_iter=100)
        values = StandardScaler().fit_transform(latents)
        loss = log_loss(labels, regression.fit(values, labels).predict_proba(values))
        regressions.append(1 - loss / np.log(labels.max() + 1))
    assert scores.infoe == pytest.approx(np.mean(regressions), abs=1e-3)


def test_continuous_information_of_normal_classes() -> None:
    generator = np.random.default_rng(0)
    source = generator.integers(0, 2, (20000, 1))
    distance = 2.0
    latent = distance * source + generator.normal(size=source.shape)
    # I = H(mixture of two normals) - H(normal), by quadrature.
    grid_values = np.linspace(-8, 10, 20001)
    density = (norm.pdf(grid_values) + norm.pdf(grid_values - distance)) / 2
    exact = trapezoid(-density * np.log(density), grid_values) - norm.entropy()
    scores = infomec(latent, source, discrete=False)
    assert scores.nmi[0, 0] * np.log(2) == pytest.approx(exact, abs=0.01)


def test_continuous_copies_of_the_sources_score_one() -> None:
    sources = grid(4, 3, 2, repeats=40)
    generator = np.random.default_rng(0)
    latents = sources + generator.uniform(-0.1, 0.1, sources.shape)
    scores = infomec(latents, sources, discrete=False)
    assert scores.infom > 0.95
    assert scores.infoc > 0.95
    assert scores.infoe == pytest.approx(1.0, abs=0.02)
    # psi(N) - psi(N_c) passes log(N / N_c) by about 1 / (2 N_c) - 1 / (2 N).
    assert np.diag(scores.nmi) == pytest.approx(1.0, abs=0.01)


def test_continuous_equal_values_are_parted_by_seeded_noise() -> None:
    sources = grid(4, 3, repeats=20)
    first, second = (infomec(sources * 1.0, sources, discrete=False, seed=seed) for seed in (0, 0))
    assert first.nmi.tolist() == second.nmi.tolist()
    assert infomec(sources * 1.0, sources, discrete=False, seed=1).nmi.tolist() != first.nmi.tolist()
    assert np.diag(first.nmi) == pytest.approx(1.0, abs=0.02)


def test_continuous_scores_do_not_depend_on_scale_or_sign() -> None:
    latents, sources = noisy_values()
    scores = infomec(latents, sources, discrete=False)
    for factor in (-1.0, 1e28, 1e-200):
        scaled = infomec(latents * factor + factor, sources, discrete=False)
        np.testing.assert_allclose(scaled.nmi, scores.nmi, atol=1e-6)
        assert scaled.active.tolist() == scores.active.tolist()
        assert scaled.infoe == pytest.approx(scores.infoe, abs=1e-4)


def test_continuous_latents_may_span_all_that_is_allowed() -> None:
    sources = grid(3, 4)
    assert infomec((sources[:, :1] - 1) * 1e30, sources, discrete=False).active.tolist() == [True]


@pytest.mark.parametrize(
    ("latents", "sources"),
    [
        (np.zeros((12, 3)), grid(3, 4)),
        (np.random.default_rng(0).normal(size=(12, 3)), np.zeros((12, 2), dtype=int)),
        # Every sample is alone in its class.
        (np.random.default_rng(0).normal(size=(12, 3)), np.arange(12)[:, None]),
        (np.random.default_rng(0).normal(size=(2, 1)), np.array([[0], [1]])),
    ],
)
def test_continuous_degenerate_input_scores_zero_information(latents: np.ndarray, sources: np.ndarray) -> None:
    scores = infomec(latents, sources, discrete=False)
    assert (scores.nmi == 0).all()
    assert (scores.infom, scores.infoc) == (0.0, 0.0)
    assert np.isfinite(scores.infoe)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_continuous_torch_latents(dtype: torch.dtype) -> None:
    latents, sources = noisy_values(samples=200)
    tensor = torch.as_tensor(latents).to(dtype)
    expected = infomec(tensor.double().numpy(), sources, discrete=False)
    assert infomec(tensor, torch.as_tensor(sources), discrete=False).nmi.tolist() == expected.nmi.tolist()


@pytest.mark.parametrize(
    ("latents", "options", "message"),
    [
        (np.array([[0.0, np.nan]] * 4), {}, "latents must be finite, got NaN or infinity in column 1"),
        (np.array([[np.inf, 0.0]] * 4), {}, "latents must be finite, got NaN or infinity in column 0"),
        (np.array([[0.0, -1e31]] * 4), {}, r"latents must lie within 1e\+30 of 0, got 1e\+31 in column 1"),
        (np.full((4, 2), 1j), {}, "latents must be real numbers, got complex128"),
        (np.zeros((4, 2)), {"neighbors": 0}, "neighbors must be at least 1, got 0"),
        (np.zeros((3, 2)), {}, "same length, got 3 and 4"),
    ],
)
def test_wrong_continuous_input_is_named(latents: np.ndarray, options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        infomec(latents, CODES, discrete=False, **options)


def test_training_protocol_leaves_out_small_ranges_and_latents_without_information() -> None:
    sources = grid(2, 2)
    first, second = sources.T
    latents = np.stack([8 * (first ^ second), 8 * first, second], axis=1)
    standalone, training = infomec(latents, sources), infomec(latents, sources, protocol="training")
    assert standalone.active.tolist() == [True, True, True]
    # A range of 1 is not more than 8 / 8.
    assert training.active.tolist() == [True, True, False]
    assert (standalone.infom, training.infom) == (pytest.approx(2 / 3), pytest.approx(1.0))
    assert (standalone.infoc, training.infoc) == (pytest.approx(1.0), pytest.approx(0.5))
    # The regression sees the third latent in both.
    assert training.infoe == pytest.approx(1.0, abs=SEPARABLE)


def test_training_protocol_reads_codes_as_numbers() -> None:
    codes = grid(4, repeats=10)
    parity = codes % 2
    values = StandardScaler().fit_transform(codes)
    regression = LogisticRegression(C=np.inf, class_weight="balanced").fit(values, parity[:, 0])
    expected = 1 - log_loss(parity[:, 0], regression.predict_proba(values)) / np.log(2)
    assert infomec(codes, parity, protocol="training").infoe == pytest.approx(expected, abs=1e-3)
    assert expected < 0.5
    assert infomec(codes, parity).infoe == pytest.approx(1.0, abs=SEPARABLE)


def test_training_protocol_of_continuous_latents() -> None:
    latents, sources = noisy_values()
    latents[:, 2] /= 30
    scores = infomec(latents, sources, discrete=False, protocol="training")
    np.testing.assert_allclose(scores.nmi, scikit_learn_nmi(latents, sources, neighbors=3), atol=1e-9)
    # The largest range is about 11, that of the third latent a quarter of one: more than 1/50, less than 1/20.
    assert scores.active.tolist() == [True, True, False, True]


def test_tripod_protocol_asks_for_an_interquartile_range() -> None:
    sources = grid(10, 2, repeats=10)
    mostly_five = np.where(np.arange(len(sources)) % 10 == 0, sources[:, 0], 5)
    latents = np.column_stack([sources[:, 0], mostly_five])
    assert infomec(latents, sources).active.tolist() == [True, True]
    assert infomec(latents, sources, protocol="tripod").active.tolist() == [True, False]
    assert infomec(latents + 0.0, sources, False, protocol="tripod").active.tolist() == [True, False]
    alone = infomec(latents[:, 1:], sources, protocol="tripod")
    assert (alone.infom, alone.infoc, alone.infoe) == (0.0, 0.0, 0.0)
    assert infomec(latents[:, 1:], sources).infoe > 0.04


def mixed_levels() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes of 32 and 4 values over [-1, 1], one source each, and a latent of values that are not evenly spaced."""
    sources = grid(32, 4, repeats=2)
    codes = np.column_stack([sources, sources[:, 1]])
    tables = (np.linspace(-1, 1, 32), np.linspace(-1, 1, 4), np.array([-1.0, -0.99, -0.98, 0.9]))
    values = np.column_stack([table[column] for table, column in zip(tables, codes.T, strict=True)])
    return codes, values, sources


def literal_active(values: np.ndarray, protocol: str) -> list[bool]:
    """The rules as the published files have them, on quantized values."""
    if protocol == "training":
        ranges = values.max(axis=0) - values.min(axis=0)
        return (ranges > ranges.max() / 8).tolist()
    quartiles = np.quantile(values, q=[0.25, 0.75], axis=0)
    return (quartiles[1] - quartiles[0] > 0.1).tolist()


@pytest.mark.parametrize("protocol", ["training", "tripod"])
def test_protocols_on_quantized_values_are_the_published_ones(protocol: str) -> None:
    codes, values, sources = mixed_levels()
    scores = infomec(codes, sources, values=values, protocol=protocol)
    assert (
        scores.active.tolist()
        == literal_active(values, protocol)
        == active_latents(codes, values=values, protocol=protocol).tolist()
    )
    # Each of 4 codes is far apart from the next: the second latent is active, though not by its codes in training.
    assert scores.active[1] and infomec(codes, sources, protocol="training").active.tolist() == [True, False, False]
    nmi = np.array([[mutual_info_score(source, code) for code in codes.T] for source in sources.T])
    nmi /= np.array([mutual_info_score(source, source) for source in sources.T])[:, None]
    kept = nmi[:, scores.active]
    modularity = (np.mean(kept.max(axis=0) / kept.sum(axis=0)) - 1 / 2) / (1 - 1 / 2)
    latents = kept.shape[1]
    compactness = (np.mean(kept.max(axis=1) / kept.sum(axis=1)) - 1 / latents) / (1 - 1 / latents)
    assert (scores.infom, scores.infoc) == (pytest.approx(modularity), pytest.approx(compactness))


def test_training_protocol_reads_the_quantized_values() -> None:
    codes, values, sources = mixed_levels()
    features = StandardScaler().fit_transform(values)
    expected = []
    for labels in sources.T:
        regression = LogisticRegression(C=np.inf, class_weight="balanced", max_iter=100)
        loss = log_loss(labels, regression.fit(features, labels).predict_proba(features))
        expected.append(1 - loss / np.log(labels.max() + 1))
    scores = infomec(codes, sources, values=values, protocol="training")
    np.testing.assert_allclose(scores.infoe_of_source, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        (CODES[:, :1], {}, r"values must have the shape of latents, \[4, 2\], got \[4, 1\]"),
        (np.full((4, 2), np.nan), {}, "must be finite"),
        (CODES, {"discrete": False}, "give none with discrete=False"),
    ],
)
def test_wrong_quantized_values_are_named(values: np.ndarray, options: dict[str, bool], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        infomec(CODES, CODES, values=values, protocol="training", **options)


def test_explicitness_by_regression_is_the_coefficient_of_determination() -> None:
    latents, sources = noisy_pair()
    scores = infomec(latents, sources, explicitness="regression")
    features = OneHotEncoder(sparse_output=False).fit_transform(latents)
    weights = np.linalg.pinv(features) @ sources
    residual = ((sources - features @ weights) ** 2).sum(axis=0)
    expected = 1 - residual / ((sources - sources.mean(axis=0)) ** 2).sum(axis=0)
    np.testing.assert_allclose(scores.infoe_of_source, expected, atol=1e-9)
    assert scores.infoe == pytest.approx(expected.mean(), abs=1e-9)
    assert scores.converged is True


def test_explicitness_of_values_by_regression() -> None:
    generator = np.random.default_rng(0)
    sources = generator.integers(0, 10, (4000, 1))
    noise = generator.normal(size=sources.shape)
    scores = infomec(sources + noise, sources, discrete=False, explicitness="regression")
    # Variance of the source over that of the latent: 99/12 and 1.
    assert scores.infoe == pytest.approx(8.25 / 9.25, abs=0.02)


@pytest.mark.parametrize("explicitness", ["classification", "regression"])
def test_held_out_explicitness_of_random_latents_is_not_above_zero(explicitness: str) -> None:
    generator = np.random.default_rng(0)
    sources, latents = generator.integers(0, 4, (1000, 2)), generator.integers(0, 5, (1000, 5))
    options = {"explicitness": explicitness}
    assert infomec(latents, sources, **options).infoe > 0.01
    assert -0.2 < infomec(latents, sources, held_out=0.5, **options).infoe < 0
    perfect = infomec(sources, sources, held_out=0.5, **options)
    assert perfect.infoe == pytest.approx(1.0, abs=SEPARABLE)


def test_held_out_explicitness_is_seeded() -> None:
    latents, sources = noisy_pair()
    first, again, other = (infomec(latents, sources, held_out=0.3, seed=seed).infoe for seed in (0, 0, 1))
    assert first == again != other


def test_more_iterations_let_a_regression_converge() -> None:
    latents, sources = noisy_pair()
    few, many = (infomec(latents, sources, iterations=iterations) for iterations in (2, 1000))
    assert (few.converged, many.converged) == (False, True)
    assert few.infoe < many.infoe


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"protocol": "paper"}, "protocol must be one of standalone, training, tripod, got 'paper'"),
        ({"explicitness": "trees"}, "explicitness must be one of classification, regression, got 'trees'"),
        ({"held_out": 1.0}, r"held_out must be a share in \[0, 1\), got 1.0"),
        ({"held_out": float("nan")}, "held_out must be a share"),
        ({"iterations": 0}, "iterations must be at least 1, got 0"),
        ({"held_out": 0.1}, "held_out=0.1 of 4 samples in 2 classes leaves 0 to score, at least 2 are needed"),
    ],
)
def test_wrong_options_are_named(options: dict[str, object], message: str) -> None:
    codes = grid(2, 2)
    with pytest.raises(ValueError, match=message):
        infomec(codes, codes, **options)
