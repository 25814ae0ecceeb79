"""All methods by name, each with its own options and the values that they have where none is given.

Free of torch, so that the command line can show them in its help. `METHODS` in qlae/methods has the classes.
"""

from collections.abc import Mapping

GAN = {"critic_steps": 5, "gradient_penalty": 10.0, "latent_weight": 200.0}

# the options are fields of `TrainConfig` that are None for all other methods
OPTIONS: dict[str, Mapping[str, int | float | str]] = {
    "qlae": {"levels": 10, "codebook": "learned", "quantization_weight": 0.3, "commitment_weight": 0.3},
    "qlinfowgan-gp": {
        "levels": 10,
        "codebook": "learned",
        "quantization_weight": 0.01,
        "commitment_weight": 0.01,
        **GAN,
    },
    "infowgan-gp": GAN,
    "ae": {},
    "vae": {"beta": 3.0},
    "tcvae": {"beta": 3.0},
    "bioae": {"nonnegativity_weight": 1.0, "activity_weight": 0.01},
    "vqvae": {"levels": 512, "quantization_weight": 1.0, "commitment_weight": 0.25},
    "fsq": {"levels": 10},
}
