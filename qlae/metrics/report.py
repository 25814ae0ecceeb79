"""All scores of one set of codes, as a table for a person and as JSON."""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from qlae.metrics.all_scores import other_scores
from qlae.metrics.dci import DEFAULT_MODEL
from qlae.metrics.fitting import collected
from qlae.metrics.infomec import NEIGHBORS, Explicitness, InfoMEC, Protocol, infomec

MEANINGS = {
    "infom": "modularity: each latent tells one source",
    "infoc": "compactness: each source is told by one latent",
    "infoe": "explicitness: a linear model reads the sources off the latents",
    "dci_disentanglement": "each latent matters to the trees of one source",
    "dci_completeness": "one latent matters to the trees of each source",
    "dci_informativeness": "accuracy of the trees, held out",
    "mig": "information gap between a source's best two latents",
    "sap": "accuracy gap between a source's best two latents",
    "factor_vae": "the steadiest latent betrays the fixed source",
    "beta_vae": "a linear model tells which source pairs share",
    "modularity": "Ridgeway and Mozer: one source a latent, by squares",
    "explicitness": "Ridgeway and Mozer: area under the ROC curve, chance 0.5",
    "irs": "a latent stays where its source stays",
}


@dataclass(frozen=True)
class Report:
    """Scores of N samples.

    Attributes:
        samples: N.
        settings: everything else that two reports must have in common to be compared, by name.
        infomec: InfoMEC with its matrix.
        others: the other scores by name; None where the samples are too few for one.
        notes: why a score is None, and which had models that did not converge.
    """

    samples: int
    settings: dict[str, object]
    infomec: InfoMEC
    others: dict[str, float | None]
    notes: list[str]

    def by_name(self) -> dict[str, float | None]:
        """Every score by the names of `MEANINGS`."""
        mec = self.infomec
        return {"infom": mec.infom, "infoc": mec.infoc, "infoe": mec.infoe} | self.others

    def json(self) -> str:
        """The scores, and what is needed to read them, as one JSON object."""
        mec = self.infomec
        rest = {
            "infoe_of_source": mec.infoe_of_source.tolist(),
            "infoe_converged": mec.converged,
            "active": mec.active.tolist(),
            "varying": mec.varying.tolist(),
            "nmi": mec.nmi.tolist(),
            "notes": self.notes,
            "samples": self.samples,
            "settings": self.settings,
        }
        return json.dumps(self.by_name() | rest, indent=2, allow_nan=False)

    def table(self) -> str:
        """One score a line, with what it measures."""
        numbers = {name: "-" if value is None else f"{value:.3f}" for name, value in self.by_name().items()}
        rows = [f"{name:<21}{number:>6}  {MEANINGS[name]}" for name, number in numbers.items()]
        mec = self.infomec
        rows.append(f"{self.samples:,} samples, {mec.active.sum()} of {len(mec.active)} latents active")
        constant = np.flatnonzero(~mec.varying)
        if len(constant):
            rows.append(f"sources that do not vary and count nowhere: {', '.join(map(str, constant))}")
        if not mec.converged:
            rows.append("a regression behind infoe had not converged at its last iteration")
        return "\n".join(rows + self.notes)


def score_codes(
    latents: np.ndarray,
    sources: np.ndarray,
    discrete: bool,
    *,
    values: np.ndarray | None = None,
    protocol: Protocol = "standalone",
    neighbors: int | None = None,
    explicitness: Explicitness = "classification",
    held_out: float = 0.0,
    iterations: int = 100,
    seed: int = 0,
) -> Report:
    """Scores latents [N, n_z] against sources [N, n_s]; the options are those of `infomec`, as are the errors."""
    options: dict[str, Any] = {
        "protocol": protocol,
        "neighbors": neighbors,
        "explicitness": explicitness,
        "held_out": held_out,
        "iterations": iterations,
        "seed": seed,
    }
    mec = infomec(latents, sources, discrete, values=values, **options)
    with collected(UserWarning) as notes:
        others = other_scores(latents, sources, discrete, seed=seed)
    counted = None if discrete else neighbors or NEIGHBORS[protocol]
    settings = options | {"discrete": discrete, "neighbors": counted, "dci_model": DEFAULT_MODEL}
    settings["from_values"] = values is not None
    return Report(len(latents), settings, mec, others, notes)
