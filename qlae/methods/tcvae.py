"""beta-TCVAE (Chen et al., NeurIPS 2018)."""

from qlae.config import TrainConfig
from qlae.latents import TotalCorrelationLatent
from qlae.methods.autoencoder import Autoencoder
from qlae.methods.vae import ELEMENTS


class TCVAE(Autoencoder):
    """Takes the KL divergence apart and weighs its total correlation by beta; divided by 12,288 as in `VAE`."""

    @classmethod
    def build_latent(cls, config: TrainConfig, image_shape: tuple[int, int, int]) -> TotalCorrelationLatent:
        return TotalCorrelationLatent(config.num_latents, weight=1.0 / ELEMENTS, beta=config.beta)
