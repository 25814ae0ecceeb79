"""beta-VAE (Higgins et al., ICLR 2017)."""

from qlae.config import TrainConfig
from qlae.latents import GaussianLatent
from qlae.methods.autoencoder import Autoencoder

# The cross-entropy is a mean over an image's elements, so the divergence is divided by their number, too. It is that of
# the paper's 64 x 64 images for images of any size: a published beta then weighs the same beside the cross-entropy.
ELEMENTS = 3 * 64 * 64


class VAE(Autoencoder):
    """Adds beta / 12,288 times the latents' KL divergence, as arXiv 2305.18378 does at 64 x 64 pixels."""

    @classmethod
    def build_latent(cls, config: TrainConfig, image_shape: tuple[int, int, int]) -> GaussianLatent:
        return GaussianLatent(config.num_latents, weight=config.beta / ELEMENTS)
