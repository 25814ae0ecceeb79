"""FSQ, finite scalar quantization (Mentzer et al., arXiv 2309.15505), over the kernels of this project.

docs/your-own-method.md walks through this file and says what else a new method takes.
"""

from torch import Tensor

from qlae.config import TrainConfig
from qlae.latents import QuantizedLatent
from qlae.methods.autoencoder import Autoencoder
from qlae_kernels import FusedLatentQuantizer


class FiniteScalarLatent(QuantizedLatent):
    """tanh bounds each latent, and the nearest of K fixed, even values from -1 to 1 replaces it; no loss term.

    For odd K this is the rounding of the publication. For even K the values are as far from 0 on either side, where
    the publication's grid has 0 and one value more below it than above.
    """

    def __init__(self, num_latents: int, levels: int) -> None:
        super().__init__(FusedLatentQuantizer(num_latents, levels, init_range=(-1.0, 1.0), learnable=False))

    def forward(self, features: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        values, _ = super().forward(features.tanh())
        return values, {}

    def encode(self, features: Tensor) -> Tensor:
        return super().encode(features.tanh())


class FSQ(Autoencoder):
    """Binary cross-entropy alone, with latents on a fixed grid."""

    @classmethod
    def build_latent(cls, config: TrainConfig, image_shape: tuple[int, int, int]) -> FiniteScalarLatent:
        return FiniteScalarLatent(config.num_latents, config.levels)
