"""VQ-VAE (van den Oord et al., NeurIPS 2017) with one vector per latent."""

from qlae.config import TrainConfig
from qlae.latents import VectorQuantizedLatent
from qlae.methods.autoencoder import Autoencoder


class VQVAE(Autoencoder):
    """Adds the quantization and commitment losses of latents that are vectors of one codebook."""

    @classmethod
    def build_latent(cls, config: TrainConfig, image_shape: tuple[int, int, int]) -> VectorQuantizedLatent:
        return VectorQuantizedLatent(
            config.num_latents,
            config.levels,
            quantization_weight=config.quantization_weight,
            commitment_weight=config.commitment_weight,
        )
