"""BioAE (Whittington et al., ICLR 2023)."""

from qlae.config import TrainConfig
from qlae.latents import NonnegativeLatent
from qlae.methods.autoencoder import Autoencoder


class BioAE(Autoencoder):
    """Adds losses that keep latents nonnegative and their activity low."""

    @classmethod
    def build_latent(cls, config: TrainConfig, image_shape: tuple[int, int, int]) -> NonnegativeLatent:
        return NonnegativeLatent(
            config.num_latents,
            nonnegativity_weight=config.nonnegativity_weight,
            activity_weight=config.activity_weight,
        )
