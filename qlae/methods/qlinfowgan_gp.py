"""QLInfoWGAN-GP, the quantized-latent GAN (Hsu et al., arXiv 2305.18378, section 3)."""

from typing import ClassVar

from qlae.config import TrainConfig
from qlae.latents import QuantizedLatent
from qlae.methods.gan import InfoWGAN
from qlae.methods.qlae import build_quantizer


class QLInfoWGANGP(InfoWGAN):
    """Latents are scalar-quantized, drawn evenly from their codes; the codes learn in generator steps alone."""

    options: ClassVar = {
        "levels": 10,
        "codebook": "learned",
        "quantization_weight": 0.01,
        "commitment_weight": 0.01,
        "critic_steps": 5,
        "gradient_penalty": 10.0,
        "latent_weight": 200.0,
    }

    @classmethod
    def build_latent(cls, config: TrainConfig) -> QuantizedLatent:
        return QuantizedLatent(build_quantizer(config))
