"""The plain autoencoder."""

from qlae.config import TrainConfig
from qlae.latents import ContinuousLatent
from qlae.methods.autoencoder import Autoencoder


class AE(Autoencoder):
    """Binary cross-entropy alone, with continuous latents."""

    @classmethod
    def build_latent(cls, config: TrainConfig, image_shape: tuple[int, int, int]) -> ContinuousLatent:
        return ContinuousLatent(config.num_latents)
