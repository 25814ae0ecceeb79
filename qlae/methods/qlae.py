"""QLAE, the quantized-latent autoencoder (Hsu et al., arXiv 2305.18378, section 3)."""

from qlae.config import TrainConfig
from qlae.latents import QuantizedLatent
from qlae.methods.autoencoder import Autoencoder
from qlae_kernels import FusedLatentQuantizer


class QLAE(Autoencoder):
    """Adds the quantization and commitment losses of scalar-quantized latents."""

    @classmethod
    def build_latent(cls, config: TrainConfig, image_shape: tuple[int, int, int]) -> QuantizedLatent:
        return QuantizedLatent(build_quantizer(config))


def build_quantizer(config: TrainConfig) -> FusedLatentQuantizer:
    """The quantizer of the configuration: `--codebook` says whether latents share their codes and these learn."""
    return FusedLatentQuantizer(
        num_latents=config.num_latents,
        levels=config.levels,
        quantization_weight=config.quantization_weight,
        commitment_weight=config.commitment_weight,
        learnable=config.codebook != "fixed",
        shared_codebook=config.codebook == "global",
    )
