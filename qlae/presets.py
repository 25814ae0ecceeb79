"""Named presets: the configuration of a method on a data set, for a CPU or as published.

Free of torch, so that the command line can show a preset's values in its help. A method's own options that no preset
names have the values in qlae/method_options.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qlae.config import TrainConfig
from qlae.errors import UserError

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Preset:
    """Fields of `TrainConfig`; those of a method go before the general ones, those of method and data before both.

    Attributes:
        general: for every method.
        methods: by method.
        data: by method, then by the first part of the data set's name, as `mpi3d` is of `mpi3d_toy`.
    """

    general: Values = field(default_factory=dict)
    methods: Mapping[str, Values] = field(default_factory=dict)
    data: Mapping[str, Mapping[str, Values]] = field(default_factory=dict)

    def config(self, method: str, data: str) -> TrainConfig:
        values = {**self.general, **self.methods.get(method, {})}
        values |= self.data.get(method, {}).get(data.split("_")[0], {})
        return TrainConfig(method=method, data=data, **values)


SMALL_GAN = {"network": "compact-gan", "learning_rate": 5e-4, "latent_weight": 20.0}

# Small images and the compact network on a CPU. QLAE's search is in docs/default-run.md, the GANs' in docs/methods.md;
# the others have QLAE's budget and what was published for Shapes3D.
DEFAULT = Preset(
    methods={
        "ae": {"weight_decay": 0.0},
        "vae": {"weight_decay": 0.0},
        "tcvae": {"weight_decay": 0.0},
        "bioae": {"weight_decay": 1e-4},
        "vqvae": {"weight_decay": 0.01},
        "qlinfowgan-gp": SMALL_GAN | {"weight_decay": 1e-3},
        "infowgan-gp": SMALL_GAN | {"weight_decay": 1e-4},
    },
)

QUANTIZED = {"levels": 10, "quantization_weight": 0.01, "commitment_weight": 0.01}
GAN = {"batch_size": 64, "learning_rate": 2e-4}

# arXiv 2305.18378 as its reference implementation runs it (github.com/kylehkhsu/latent_quantization, configs/)
PAPER = Preset(
    general={
        "resolution": 64,
        "network": "paper",
        "steps": 200_000,
        "batch_size": 128,
        "learning_rate": 1e-3,
        "schedule": "constant",
        "weight_decay": 0.1,
        "gradient_clip": 1.0,
        "evaluation_every": 5_000,
    },
    methods={
        "qlae": QUANTIZED,
        "qlinfowgan-gp": GAN | QUANTIZED | {"weight_decay": 1e-3},
        "infowgan-gp": GAN | {"weight_decay": 1e-4},
        "ae": {"weight_decay": 0.0},
        "vae": {"weight_decay": 0.0},
        "tcvae": {"weight_decay": 0.0},
        "bioae": {"weight_decay": 1e-4},
        "vqvae": {"weight_decay": 0.01},
    },
    data={
        "qlae": {"mpi3d": {"weight_decay": 1e-3}},
        "qlinfowgan-gp": {"falcor3d": {"weight_decay": 1e-4}},
        "ae": {"mpi3d": {"weight_decay": 1e-3}},
        "vae": {
            "shapes3d": {"beta": 3.0},
            "mpi3d": {"beta": 0.1},
            "falcor3d": {"beta": 10.0},
            "isaac3d": {"beta": 0.3},
        },
        "tcvae": {
            "shapes3d": {"beta": 3.0},
            "mpi3d": {"beta": 0.3},
            "falcor3d": {"beta": 3.0},
            "isaac3d": {"beta": 1.0},
        },
        "bioae": {
            "shapes3d": {"activity_weight": 0.01},
            "mpi3d": {"activity_weight": 0.01},
            "falcor3d": {"activity_weight": 0.01},
            "isaac3d": {"activity_weight": 0.1},
        },
    },
)

PRESETS: dict[str, Preset] = {"default": DEFAULT, "paper": PAPER}


def preset(name: str, method: str = "qlae", data: str = "rooms3d") -> TrainConfig:
    """The preset's configuration of a method on a data set. A method or a set that it does not name has the general
    values.

    Raises:
        UserError: for an unknown preset.
    """
    if name not in PRESETS:
        raise UserError(f"unknown preset {name!r}: choose one of {', '.join(PRESETS)}")
    return PRESETS[name].config(method, data)
