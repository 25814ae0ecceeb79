"""The FactorVAE score: does the latent that varies least betray which source was held fixed?"""

import numpy as np
import torch

from qlae.metrics.fixed_factor import FixedFactorSampler
from qlae.metrics.mutual_information import standardise
from qlae.metrics.samples import check_lengths, relabel, sources_of, values_of

# Groups whose latents are held at a time, to bound the memory.
_CHUNK = 1000


def factor_vae(
    latents: np.ndarray | torch.Tensor,  # [N, n_z]
    sources: np.ndarray | torch.Tensor,  # [N, n_s]
    *,
    group_size: int = 64,
    train_votes: int = 10_000,
    test_votes: int = 5_000,
    seed: int = 0,
) -> float:
    """Accuracy of a majority vote for the source that was held fixed, in [0, 1]; chance is about 1 / n_s.

    A vote: hold a random source at the value of a random sample, draw `group_size` samples with that value, and
    name the latent whose variance among them, over its variance among all, is least. Each latent then stands for
    the source that most of its training votes came from.

    Source: Kim and Mnih, "Disentangling by Factorising" (ICML 2018, arXiv 1802.05983); the sizes are
    those of Locatello et al. 2019. The groups are drawn from the samples given (see `FixedFactorSampler`), for
    training and test alike. Latents enter as numbers. Constant latents and constant sources take no part; without
    a varying latent or source the score is 0. disentanglement_lib also leaves out latents whose variance is below
    0.05 (`prune_dims.threshold`), which depends on their scale; here every latent that varies takes part.

    Args:
        latents: real numbers or codes.
        sources: whole numbers.
        group_size: samples a vote.
        train_votes: votes that assign sources to latents.
        test_votes: votes that are scored.
        seed: of the draws.

    Raises:
        ValueError: as `infomec`; for sizes below 1, groups below 2; if all samples differ in a source.
    """
    if group_size < 2 or train_votes < 1 or test_votes < 1:
        raise ValueError(
            f"group_size must be at least 2 and the votes at least 1, got {group_size}, {train_votes}, {test_votes}"
        )
    values, (labels, sizes) = values_of(latents), relabel(sources_of(sources))
    check_lengths(values, labels, score="factor_vae")
    values, labels = values[:, np.ptp(values, axis=0) > 0], labels[:, sizes > 1]
    if values.shape[1] == 0 or labels.shape[1] == 0:
        return 0.0
    normalised = standardise(values)
    sampler = FixedFactorSampler(labels, np.random.default_rng(seed))
    classifier = _votes(sampler, normalised, labels.shape[1], train_votes, group_size).argmax(axis=0)
    tested = _votes(sampler, normalised, labels.shape[1], test_votes, group_size)
    return float(tested[classifier, np.arange(values.shape[1])].sum() / test_votes)


def _votes(
    sampler: FixedFactorSampler, normalised: np.ndarray, num_sources: int, count: int, group_size: int
) -> np.ndarray:
    """How often each latent varied least while each source was fixed, int64 [n_s, n_z]."""
    votes = np.zeros((num_sources, normalised.shape[1]), dtype=np.int64)
    rounds = np.bincount(sampler.sources(count), minlength=num_sources)
    for source, total in enumerate(rounds):
        for start in range(0, total, _CHUNK):
            groups = sampler.groups(source, min(_CHUNK, total - start), group_size)
            least = normalised[groups].var(axis=1).argmin(axis=1)
            votes[source] += np.bincount(least, minlength=normalised.shape[1])
    return votes
