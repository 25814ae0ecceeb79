"""beta-VAE (Higgins et al., ICLR 2017)."""

from math import prod

from qlae.config import TrainConfig
from qlae.latents import GaussianLatent
from qlae.methods.autoencoder import Autoencoder


class VAE(Autoencoder):
    """Adds beta times the latents' KL divergence, per image element as the cross-entropy is."""

    @classmethod
    def build_latent(cls, config: TrainConfig, image_shape: tuple[int, int, int]) -> GaussianLatent:
        return GaussianLatent(config.num_latents, weight=config.beta / prod(image_shape))
