"""beta-TCVAE (Chen et al., NeurIPS 2018)."""

from math import prod

from qlae.config import TrainConfig
from qlae.latents import TotalCorrelationLatent
from qlae.methods.autoencoder import Autoencoder


class TCVAE(Autoencoder):
    """Takes the KL divergence apart and weighs its total correlation by beta; per image element as in `VAE`."""

    @classmethod
    def build_latent(cls, config: TrainConfig, image_shape: tuple[int, int, int]) -> TotalCorrelationLatent:
        return TotalCorrelationLatent(config.num_latents, weight=1.0 / prod(image_shape), beta=config.beta)
