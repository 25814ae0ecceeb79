"""The training of a GAN that also infers its latents: InfoGAN with the losses of WGAN-GP."""

from abc import abstractmethod
from typing import Any, Self

import torch
from torch import Tensor, nn

from qlae.config import TrainConfig
from qlae.latents import SampledLatent
from qlae.methods.base import Method, build_optimizer, split_parameters, update
from qlae.networks import build_network
from qlae.networks.base import Encoder

# Gulrajani et al., NeurIPS 2017
BETAS = (0.0, 0.9)


class InfoWGAN(Method):
    """A generator, and a critic that shares the encoder's trunk (Hsu et al., arXiv 2305.18378, section 3).

    The decoder is the generator. With x real images, z values from the latents' prior, G(z) the images made of them,
    z' what the latents make of G(z), C the critic, and u uniform from 0 to 1 for each image:

        shared = latent_weight * mean((z' - z)^2) + the latents' own loss terms, on G(z)
        critic's loss = mean(C(G(z)) - C(x)) + gradient_penalty * mean((|dC/dm| - 1)^2) + shared
        generator's loss = -mean(C(G(z))) + shared

    where m = u x + (1 - u) G(z) and the norm is over a whole image. The critic's loss teaches encoder and critic,
    the generator's the decoder and what the latents learn. Both have an AdamW of their own.
    """

    generative = True
    latent: SampledLatent

    def __init__(
        self,
        encoder: Encoder,
        latent: SampledLatent,
        decoder: nn.Module,
        *,
        learning_rate: float,
        weight_decay: float,
        gradient_clip: float,
        critic_steps: int,
        gradient_penalty: float,
        latent_weight: float,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.critic = nn.Linear(encoder.trunk_width, 1)
        self.decoder = decoder
        self.latent = latent
        self.critic_steps = critic_steps
        self.gradient_penalty = gradient_penalty
        self.latent_weight = latent_weight
        self.critic_steps_taken = 0
        self.optimizers = {
            name: build_optimizer(
                split_parameters(*modules),
                learning_rate=learning_rate,
                weight_decay=weight_decay,
                gradient_clip=gradient_clip,
                betas=BETAS,
            )
            for name, modules in {"critic": (encoder, self.critic), "generator": (decoder, latent)}.items()
        }

    @classmethod
    @abstractmethod
    def build_latent(cls, config: TrainConfig) -> SampledLatent:
        """The method's latents; this is what one GAN has of its own."""

    @classmethod
    def from_config(cls, config: TrainConfig, image_shape: tuple[int, int, int]) -> Self:
        latent = cls.build_latent(config)
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
            critic_steps=config.critic_steps,
            gradient_penalty=config.gradient_penalty,
            latent_weight=config.latent_weight,
        )

    def training_step(self, images: Tensor) -> dict[str, Tensor]:
        """One step of the critic, and one of the generator after every `critic_steps` of them."""
        values = self.critic_step(images)
        self.critic_steps_taken += 1
        if self.critic_steps_taken % self.critic_steps == 0:
            values |= self.generator_step(len(images))
        return values

    def critic_step(self, images: Tensor) -> dict[str, Tensor]:
        """Teaches encoder and critic from real images and as many generated ones."""
        with torch.no_grad():
            drawn = self.latent.sample(len(images))
            generated = self.decoder(drawn).sigmoid()
        generated_value, shared = self._judge(generated, drawn)
        gap = (self.critic(self.encoder.trunk(images)) - generated_value).mean()
        penalty = self.gradient_penalty * self._penalty(images, generated)
        loss = penalty - gap + sum(shared.values())
        update(self.optimizers["critic"], loss)
        values = {"critic_loss": loss, "critic_gap": gap, "gradient_penalty": penalty, **shared}
        return {name: value.detach() for name, value in values.items()}

    def generator_step(self, count: int) -> dict[str, Tensor]:
        """Teaches the decoder and the latents from `count` generated images."""
        drawn = self.latent.sample(count)
        value, shared = self._judge(self.decoder(drawn).sigmoid(), drawn)
        loss = sum(shared.values()) - value.mean()
        update(self.optimizers["generator"], loss)
        return {"generator_loss": loss.detach()}

    def training_state(self) -> dict[str, Any]:
        return super().training_state() | {"critic_steps_taken": self.critic_steps_taken}

    def load_training_state(self, state: dict[str, Any]) -> None:
        super().load_training_state(state)
        self.critic_steps_taken = state["critic_steps_taken"]

    def _judge(self, generated: Tensor, drawn: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The critic's values [B, 1] of generated images, and the losses that critic and generator share."""
        trunk = self.encoder.trunk(generated)
        inferred, terms = self.latent(self.encoder.head(trunk))
        return self.critic(trunk), {"latent": self.latent_weight * (inferred - drawn).square().mean(), **terms}

    def _penalty(self, images: Tensor, generated: Tensor) -> Tensor:
        share = torch.rand(len(images), 1, 1, 1, device=images.device)
        mixed = (share * images + (1.0 - share) * generated).requires_grad_()
        value = self.critic(self.encoder.trunk(mixed)).sum()
        (gradient,) = torch.autograd.grad(value, mixed, create_graph=True)
        return (gradient.flatten(1).norm(dim=1) - 1.0).square().mean()
