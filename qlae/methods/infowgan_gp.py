"""InfoWGAN-GP, the continuous baseline of QLInfoWGAN-GP."""

from qlae.config import TrainConfig
from qlae.latents import UniformLatent
from qlae.methods.gan import InfoWGAN


class InfoWGANGP(InfoWGAN):
    """Latents are continuous, drawn uniformly from 0 to 1."""

    @classmethod
    def build_latent(cls, config: TrainConfig) -> UniformLatent:
        return UniformLatent(config.num_latents)
