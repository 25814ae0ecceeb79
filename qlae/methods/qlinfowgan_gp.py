"""QLInfoWGAN-GP, the quantized-latent GAN (Hsu et al., arXiv 2305.18378, section 3)."""

from qlae.config import TrainConfig
from qlae.latents import QuantizedLatent
from qlae.methods.gan import InfoWGAN
from qlae.methods.qlae import build_quantizer


class QLInfoWGANGP(InfoWGAN):
    """Latents are scalar-quantized, drawn evenly from their codes; the codes learn in generator steps alone."""

    @classmethod
    def build_latent(cls, config: TrainConfig) -> QuantizedLatent:
        return QuantizedLatent(build_quantizer(config))
