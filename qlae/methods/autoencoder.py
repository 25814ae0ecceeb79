"""The training step that all autoencoders share; they differ in their latents and the weights of the losses."""

from abc import abstractmethod
from typing import Self

from torch import Tensor, nn
from torch.nn import functional

from qlae.config import TrainConfig
from qlae.latents import Latent
from qlae.methods.base import Method, batch_psnr, build_optimizer, split_parameters, update
from qlae.networks import build_network
from qlae.networks.base import Encoder


class Autoencoder(Method):
    """Minimises mean binary cross-entropy plus the loss terms of the latents."""

    def __init__(
        self,
        encoder: Encoder,
        latent: Latent,
        decoder: nn.Module,
        *,
        learning_rate: float,
        weight_decay: float,
        gradient_clip: float,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.latent = latent
        self.optimizer = build_optimizer(
            split_parameters(encoder, decoder, latent),
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            gradient_clip=gradient_clip,
        )
        self.optimizers = {"autoencoder": self.optimizer}

    @classmethod
    @abstractmethod
    def build_latent(cls, config: TrainConfig, image_shape: tuple[int, int, int]) -> Latent:
        """The method's latents; this is what one autoencoder has of its own."""

    @classmethod
    def from_config(cls, config: TrainConfig, image_shape: tuple[int, int, int]) -> Self:
        latent = cls.build_latent(config, image_shape)
        encoder, decoder = build_network(
            config.network, image_shape=image_shape, features=latent.features, width=latent.width
        )
        return cls(
            encoder,
            latent,
            decoder,
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
            gradient_clip=config.gradient_clip,
        )

    def training_step(self, images: Tensor) -> dict[str, Tensor]:
        values, terms = self.latent(self.encoder(images))
        logits = self.decoder(values)
        reconstruction = functional.binary_cross_entropy_with_logits(logits, images)
        loss = reconstruction + sum(terms.values())
        update(self.optimizer, loss)
        return {
            "loss": loss.detach(),
            "reconstruction": reconstruction.detach(),
            **{name: term.detach() for name, term in terms.items()},
            "psnr": batch_psnr(images, logits),
        }
