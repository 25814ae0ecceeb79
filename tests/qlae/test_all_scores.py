"""Every score on codes with a known answer, and what must not change it."""

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch

from qlae.metrics import (
    all_scores,
    beta_vae,
    dci,
    explicitness,
    factor_vae,
    infomec,
    irs,
    modularity,
    mutual_information_gap,
    sap,
)

Score = Callable[[np.ndarray, np.ndarray], float]

SIZES = (4, 3, 2)

SCORES: dict[str, Score] = {
    "infom": lambda latents, sources: infomec(latents, sources).infom,
    "infoc": lambda latents, sources: infomec(latents, sources).infoc,
    "infoe": lambda latents, sources: infomec(latents, sources).infoe,
    "disentanglement": lambda latents, sources: dci(latents, sources, trees=20).disentanglement,
    "completeness": lambda latents, sources: dci(latents, sources, trees=20).completeness,
    "informativeness": lambda latents, sources: dci(latents, sources, trees=20).informativeness,
    "mig": mutual_information_gap,
    "sap": sap,
    "sap_of_values": partial(sap, continuous_sources=True),
    "factor_vae": partial(factor_vae, train_votes=400, test_votes=200),
    "beta_vae": partial(beta_vae, train_points=400, test_points=200),
    "modularity": modularity,
    "explicitness": explicitness,
    "irs": irs,
}

# Those that ask whether latents are codes, for latents that are not.
OF_VALUES: dict[str, Score] = {
    "infoe": lambda latents, sources: infomec(latents, sources, discrete=False).infoe,
    "mig": partial(mutual_information_gap, discrete=False),
    "modularity": partial(modularity, discrete=False),
}

# What a score says of codes that have nothing to do with the sources. Accuracies and areas have a chance of their own.
CHANCE = {
    "informativeness": np.mean([1 / size for size in SIZES]),
    "factor_vae": 1 / 3,
    "beta_vae": 1 / 3,
    "explicitness": 0.5,
}

# Scores that are ratios of the little information that chance leaves, or of small importances, say anything.
UNDEFINED_AT_CHANCE = {"infom", "infoc", "modularity"}


def independent_sources(repeats: int = 20) -> np.ndarray:
    """Sources of sizes 4, 3 and 2, all combinations equally often."""
    return np.repeat(np.indices(SIZES).reshape(len(SIZES), -1).T, repeats, axis=0)


def noisy(sources: np.ndarray, kept: float = 0.7) -> np.ndarray:
    """Codes that are right with probability `kept` and else random."""
    generator = np.random.default_rng(0)
    noise = generator.integers(0, SIZES, sources.shape)
    return np.where(generator.random(sources.shape) < kept, sources, noise)


@pytest.fixture(params=SCORES)
def score(request: pytest.FixtureRequest) -> Score:
    return SCORES[request.param]


def expect(values: dict[str, float], latents: np.ndarray, sources: np.ndarray, tolerance: float = 5e-3) -> None:
    measured = {name: SCORES[name](latents, sources) for name in values}
    assert measured == {name: pytest.approx(value, abs=tolerance) for name, value in values.items()}


def test_perfect_codes_score_one() -> None:
    sources = independent_sources()
    expect(dict.fromkeys(SCORES.keys() - {"sap"}, 1.0), sources, sources)


def test_random_codes_score_by_chance() -> None:
    sources = independent_sources(repeats=80)
    codes = np.random.default_rng(0).integers(0, 5, (len(sources), 5))
    expected = {name: CHANCE.get(name, 0.0) for name in SCORES if name not in UNDEFINED_AT_CHANCE}
    expect(expected, codes, sources, tolerance=0.1)


def test_noisy_codes_score_in_between(score: Score) -> None:
    sources = independent_sources()
    random = np.random.default_rng(1).integers(0, SIZES, sources.shape)
    # A maximum of deviations, and a vote of 64 samples, are lost to noise or to none at all.
    margin = 0.0 if score in (SCORES["irs"], SCORES["factor_vae"], SCORES["beta_vae"], SCORES["modularity"]) else 0.01
    value = score(noisy(sources), sources)
    assert value <= score(sources, sources) - margin
    if score not in [SCORES[name] for name in UNDEFINED_AT_CHANCE]:
        assert value >= score(random, sources) + margin


def test_duplicated_latents_cost_what_compares_latents() -> None:
    sources = independent_sources()
    # Two latents tell the first source, one each the others.
    latents = sources[:, [0, 0, 1, 2]]
    modular = ("infom", "infoe", "disentanglement", "informativeness", "factor_vae", "beta_vae")
    expect(dict.fromkeys([*modular, "modularity", "explicitness", "irs"], 1.0), latents, sources)
    # The first source has no gap.
    expect({"mig": 2 / 3, "sap_of_values": 2 / 3}, latents, sources)
    # Of the others, three and two values, chance leaves 2/3 and 1/2.
    expect({"sap": (2 / 3 + 1 / 2) / 3}, latents, sources, tolerance=0.05)
    # The trees take either of the two at will: at most log 2 / log 4 of the first source's completeness is lost.
    assert 1 - 0.5 / 3 - 1e-9 <= SCORES["completeness"](latents, sources) < 1.0


def test_rotated_codes_are_explicit_and_nothing_else() -> None:
    sources = np.repeat(np.indices((2, 2)).reshape(2, -1).T, 50, axis=0)
    latents = np.stack([sources[:, 0] + sources[:, 1], sources[:, 0] - sources[:, 1]], axis=1)
    expect(dict.fromkeys(["infom", "infoc", "mig", "sap_of_values", "modularity"], 0.0), latents, sources)
    expect({"sap": 0.0}, latents, sources, tolerance=0.05)
    expect(dict.fromkeys(["infoe", "informativeness", "explicitness"], 1.0), latents, sources)
    # Either latent is as good for either source. With one fixed, half of the deviations are left.
    expect({"irs": 0.5}, latents, sources)
    for name in ("factor_vae", "beta_vae"):
        assert SCORES[name](latents, sources) < 0.7


def test_dead_latents() -> None:
    sources = independent_sources()
    latents = noisy(sources)
    with_dead = np.insert(latents, 1, 7, axis=1)
    unchanged = ["infom", "infoc", "infoe", "disentanglement", "mig", "sap", "sap_of_values", "factor_vae"]
    unchanged += ["explicitness", "irs"]
    expect({name: SCORES[name](latents, sources) for name in unchanged}, with_dead, sources, tolerance=0.02)
    # The mean over latents counts the dead one as 0.
    expect({"modularity": 0.75}, np.insert(sources, 1, 7, axis=1), sources)
    only_dead = dict.fromkeys(["infom", "infoc", "infoe", "disentanglement", "completeness", "mig"], 0.0)
    only_dead |= {"sap": 0.0, "sap_of_values": 0.0}
    only_dead |= {"factor_vae": 0.0, "beta_vae": 0.0, "modularity": 0.0, "irs": 0.0, "explicitness": 0.5}
    expect(only_dead, np.full_like(sources, 3), sources)


def test_constant_sources_count_nowhere(score: Score) -> None:
    sources = independent_sources()
    latents = noisy(sources)
    assert score(latents, np.insert(sources, 1, 5, axis=1)) == pytest.approx(score(latents, sources), abs=1e-9)


def test_no_varying_source_is_worth_nothing() -> None:
    sources = independent_sources()
    values = dict.fromkeys(SCORES, 0.0) | {"explicitness": 0.5}
    expect(values, sources, np.full_like(sources, 3))


def test_one_varying_source_and_one_latent(score: Score) -> None:
    sources = independent_sources()[:, 1:2]
    # A second latent, constant, is right for one value of three.
    expected = 2 / 3 if score is sap else 1.0
    assert score(sources, sources) == pytest.approx(expected, abs=5e-3)


def test_order_of_latents_does_not_matter(score: Score) -> None:
    sources = independent_sources()
    latents = noisy(sources)
    # A permuted forest breaks its ties otherwise.
    assert score(latents[:, [2, 0, 1]], sources) == pytest.approx(score(latents, sources), abs=0.02)


def test_order_of_samples_and_sources_does_not_matter(score: Score) -> None:
    sources = independent_sources(repeats=60)
    latents = noisy(sources)
    order = np.random.default_rng(0).permutation(len(sources))
    # Splits and draws are of other samples then.
    permuted = score(latents[order], sources[order][:, [1, 2, 0]])
    assert permuted == pytest.approx(score(latents, sources), abs=0.04)


def test_scores_of_frequencies_do_not_know_the_names_of_codes() -> None:
    sources = independent_sources()
    latents = noisy(sources)
    renamed = np.array([12, -7, 2**40, 3])[latents]
    for name in ("infom", "infoc", "mig", "modularity"):
        assert SCORES[name](renamed, sources) == pytest.approx(SCORES[name](latents, sources), abs=1e-12)
    assert SCORES["infoe"](renamed, sources) == pytest.approx(SCORES["infoe"](latents, sources), abs=1e-4)


def test_scores_of_trees_know_the_order_alone() -> None:
    sources = independent_sources()
    latents = noisy(sources)
    stretched = np.exp(3.0 * latents)
    expected, scores = (dci(codes, sources, trees=20) for codes in (latents, stretched))
    np.testing.assert_allclose(scores.importance, expected.importance, atol=1e-9)
    assert scores.informativeness == pytest.approx(expected.informativeness, abs=1e-9)


@pytest.mark.parametrize(
    "name", ["infoe", "sap", "sap_of_values", "factor_vae", "explicitness", "disentanglement", "informativeness"]
)
def test_scale_and_place_of_each_latent_do_not_matter(name: str) -> None:
    sources = independent_sources()
    latents = noisy(sources) + np.random.default_rng(0).normal(0, 0.1, sources.shape)
    score = OF_VALUES.get(name, SCORES[name])
    moved = latents * [-3.0, 0.01, 200.0] + [1.0, -5.0, 0.0]
    assert score(moved, sources) == pytest.approx(score(latents, sources), abs=0.01)


LARGE = {"2**40": 2**40, "1e9": 10**9, "2**53": 2**53, "2**62": 2**62}


@pytest.mark.parametrize("offset", LARGE.values(), ids=LARGE)
def test_codes_of_a_large_offset_score_as_those_from_zero(score: Score, offset: int) -> None:
    sources = independent_sources()
    latents = noisy(sources)
    assert score(latents + offset, sources) == pytest.approx(score(latents, sources), abs=1e-9)


@pytest.mark.parametrize("offset", [2.0**40, 1e9, -1e9])
@pytest.mark.parametrize("name", ["infoe", *(name for name in SCORES if name not in ("infom", "infoc", "infoe"))])
def test_values_of_a_large_offset_score_as_those_from_zero(name: str, offset: float) -> None:
    sources = independent_sources()
    latents = noisy(sources) * 0.25
    score = OF_VALUES.get(name, SCORES[name])
    assert score(latents + offset, sources) == pytest.approx(score(latents, sources), abs=1e-6)


@pytest.mark.parametrize("scale", [1e-200, 1e-9, 1e29])
@pytest.mark.parametrize("name", [name for name in SCORES if name not in ("infom", "infoc", "beta_vae")])
def test_one_common_scale_does_not_matter(name: str, scale: float) -> None:
    sources = independent_sources()
    latents = noisy(sources) * 1.0
    score = OF_VALUES.get(name, SCORES[name])
    assert score(latents * scale, sources) == pytest.approx(score(latents, sources), abs=1e-4)


def test_irs_knows_one_common_scale() -> None:
    sources = independent_sources()
    latents = noisy(sources)
    assert irs(-7.0 * latents + 3.0, sources) == pytest.approx(irs(latents, sources), abs=1e-9)


def test_torch_and_numpy_give_the_same_scores(score: Score) -> None:
    sources = independent_sources(repeats=4)
    latents = noisy(sources)
    assert score(torch.as_tensor(latents), torch.as_tensor(sources)) == score(latents, sources)


def test_scores_repeat(score: Score) -> None:
    sources = independent_sources(repeats=4)
    latents = noisy(sources)
    assert score(latents, sources) == score(latents, sources)


def test_names_and_values_of_all_scores() -> None:
    sources = independent_sources()
    latents = noisy(sources)
    scores = all_scores(latents, sources)
    assert list(scores) == [
        *("infom", "infoc", "infoe", "dci_disentanglement", "dci_completeness", "dci_informativeness", "mig", "sap"),
        *("factor_vae", "beta_vae", "modularity", "explicitness", "irs"),
    ]
    assert scores["infom"] == infomec(latents, sources).infom
    assert scores["dci_completeness"] == dci(latents, sources).completeness
    assert scores["mig"] == mutual_information_gap(latents, sources)
    assert scores["sap"] == sap(latents, sources)
    assert all(type(value) is float for value in scores.values())


def test_a_score_without_a_value_is_none_and_says_why() -> None:
    sources = np.arange(30)[:, None]
    with pytest.warns(UserWarning) as caught:
        scores = all_scores(sources // 3, sources)
    none = [name for name, value in scores.items() if value is None]
    lost = ["dci_disentanglement", "dci_completeness", "dci_informativeness", "sap", "factor_vae", "beta_vae"]
    # With one varying source beta-VAE is 1 without a draw.
    assert none == [*lost[:-1], "explicitness"]
    assert scores["infoc"] == scores["irs"] == 1.0
    reasons = [str(entry.message).split(":")[0] for entry in caught]
    assert reasons == [f"{name} has no value" for name in ("dci", "sap", "factor_vae", "explicitness")]


def test_continuous_latents_of_all_scores() -> None:
    sources = independent_sources()
    latents = sources + np.random.default_rng(0).normal(0, 0.05, sources.shape)
    scores = all_scores(latents, sources, discrete=False)
    near_one = {name: value for name, value in scores.items() if name not in ("sap", "irs")}
    assert near_one == {name: pytest.approx(1.0, abs=0.1) for name in near_one}


CODES = np.zeros((6, 2), dtype=np.int64)


@pytest.mark.parametrize(
    ("latents", "sources", "message"),
    [
        (CODES[:, 0], CODES, r"latents must have shape \[N, n_z\]"),
        (CODES, CODES[:5], "same length, got 6 and 5"),
        (CODES[:1], CODES[:1], "needs at least 2 samples, got 1"),
        (CODES, CODES + 0.5, "sources must be whole numbers"),
        (CODES, np.full((6, 2), "red"), "sources must be integers"),
        (np.full((6, 2), "red"), CODES, "latents must be"),
    ],
)
def test_wrong_input_is_named(score: Score, latents: np.ndarray, sources: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score(latents, sources)


@pytest.mark.parametrize("name", ["sap", "factor_vae", "beta_vae", "explicitness", "disentanglement", "irs"])
def test_latents_that_are_not_finite_are_named(name: str) -> None:
    with pytest.raises(ValueError, match="latents must be finite, got NaN or infinity in column 1"):
        SCORES[name](np.array([[0.0, np.nan]] * 6), CODES)


@pytest.mark.parametrize("name", ["sap", "factor_vae", "beta_vae", "explicitness", "disentanglement", "irs"])
@pytest.mark.parametrize("value", [1.1e30, -1e200, 1.7e308])
def test_latents_too_large_to_compute_with_are_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=r"latents must lie within 1e\+30 of 0, got .* in column 1: rescale them"):
        SCORES[name](np.array([[0.0, value]] * 6), CODES)
