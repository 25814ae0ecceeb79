"""InfoWGAN-GP, the continuous baseline of QLInfoWGAN-GP."""

from typing import ClassVar

from qlae.config import TrainConfig
from qlae.latents import UniformLatent
from qlae.methods.gan import InfoWGAN


class InfoWGANGP(InfoWGAN):
    """Latents are continuous, drawn uniformly from 0 to 1."""

    options: ClassVar = {"critic_steps": 5, "gradient_penalty": 10.0, "latent_weight": 200.0}

    @classmethod
    def build_latent(cls, config: TrainConfig) -> UniformLatent:
        return UniformLatent(config.num_latents)
