"""QLAE, the quantized-latent autoencoder (Hsu et al., arXiv 2305.18378, section 3)."""

from typing import Self

from torch import Tensor, nn
from torch.nn import functional

from qlae.config import TrainConfig
from qlae.methods.base import Method, batch_psnr, build_optimizer, clip_gradients, split_parameters
from qlae.networks import build_network
from qlae_kernels import FusedLatentQuantizer


class QLAE(Method):
    """Minimises mean binary cross-entropy plus the quantization and commitment losses of the latents."""

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        quantizer: FusedLatentQuantizer,
        *,
        learning_rate: float,
        weight_decay: float,
        gradient_clip: float,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.quantizer = quantizer
        self.optimizer = build_optimizer(
            split_parameters(self),
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            gradient_clip=gradient_clip,
        )
        self.optimizers = {"autoencoder": self.optimizer}

    @classmethod
    def from_config(cls, config: TrainConfig, image_shape: tuple[int, int, int]) -> Self:
        """As the configuration has it, for images of shape (3, height, width)."""
        encoder, decoder = build_network(config.network, image_shape=image_shape, num_latents=config.num_latents)
        quantizer = FusedLatentQuantizer(
            num_latents=config.num_latents,
            levels=config.levels,
            quantization_weight=config.quantization_weight,
            commitment_weight=config.commitment_weight,
        )
        return cls(
            encoder,
            decoder,
            quantizer,
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
            gradient_clip=config.gradient_clip,
        )

    def training_step(self, images: Tensor) -> dict[str, Tensor]:
        quantized, _, quantization = self.quantizer(self.encoder(images))
        logits = self.decoder(quantized)
        reconstruction = functional.binary_cross_entropy_with_logits(logits, images)
        loss = reconstruction + quantization
        self.optimizer.zero_grad()
        loss.backward()
        clip_gradients(self.optimizer)
        self.optimizer.step()
        return {
            "loss": loss.detach(),
            "reconstruction": reconstruction.detach(),
            "quantization": quantization.detach(),
            "psnr": batch_psnr(images, logits),
        }
