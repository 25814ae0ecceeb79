"""What every training method offers, and the optimizer that the paper trains them all with."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from qlae.config import TrainConfig
from qlae.latents import Latent
from qlae.metrics import PSNR_CAP
from qlae.networks.base import Encoder


class Method(nn.Module, ABC):
    """A model that codes images by latents, together with the way it learns.

    Attributes:
        generative: whether it learns to make images of latents drawn from their prior.
        encoder: images float32 [B, 3, H, W] in [0, 1] -> features [B, F].
        latent: features [B, F] -> codes [B, D], and values [B, W].
        decoder: values [B, W] -> logits [B, 3, H, W].
        optimizers: by name; a checkpoint keeps the state of each.
    """

    generative: ClassVar[bool] = False
    encoder: Encoder
    latent: Latent
    decoder: nn.Module
    optimizers: dict[str, Optimizer]

    @classmethod
    @abstractmethod
    def from_config(cls, config: TrainConfig, image_shape: tuple[int, int, int]) -> Self:
        """Newly initialised, as the configuration has it, for images of shape (3, height, width)."""

    @abstractmethod
    def training_step(self, images: Tensor) -> dict[str, Tensor]:
        """Learns from one batch, float32 [B, 3, H, W] in [0, 1]: all forward and backward passes and updates.

        Returns:
            Detached scalars by name on the images' device, finite as long as training does not diverge.
        """

    def training_state(self) -> dict[str, Any]:
        """What, besides the weights, decides how the method goes on; kept in checkpoints."""
        return {"optimizers": {name: each.state_dict() for name, each in self.optimizers.items()}}

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Takes back what `training_state` gave."""
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])

    def set_learning_rate_factor(self, factor: float) -> None:
        """Every learning rate becomes `factor` times the one its optimizer was made with."""
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = factor * group["initial_lr"]

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Codes [B, D] of images [B, 3, H, W]."""
        return self.latent.encode(self.encoder(images))

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Images float32 [B, 3, H, W] in [0, 1] of codes [B, D]."""
        return self.decoder(self.latent.decode(codes)).sigmoid()

    def encode_and_reconstruct(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Codes [B, D] of images [B, 3, H, W], and the images that these codes stand for."""
        codes = self.encode(images)
        return codes, self.decode(codes)

    def reconstruct(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] after encoding and decoding."""
        return self.encode_and_reconstruct(images)[1]


def split_parameters(*modules: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The regularized parameters of the modules, and the free ones: those named `bias` and all of a `Latent`.

    Weights of norms and a decoder's learned constant are regularized too, as in the paper's implementation.
    """
    regularized, free = [], []
    for module in modules:
        for name, parameter in module.named_parameters():
            is_free = name.split(".")[-1] == "bias" or isinstance(module, Latent)
            (free if is_free else regularized).append(parameter)
    return regularized, free


def build_optimizer(
    parameters: tuple[list[nn.Parameter], list[nn.Parameter]],
    *,
    learning_rate: float,
    weight_decay: float,
    gradient_clip: float,
    betas: tuple[float, float] = (0.9, 0.999),
) -> AdamW:
    """AdamW with decoupled decay (p -= learning_rate * weight_decay * p) on the regularized parameters alone.

    Args:
        parameters: what `split_parameters` returns.
        gradient_clip: bound on each element of the regularized parameters' gradients; kept in their group for
            `update`.
    """
    regularized, free = parameters
    groups = [
        {"params": regularized, "weight_decay": weight_decay, "gradient_clip": gradient_clip},
        {"params": free, "weight_decay": 0.0, "gradient_clip": None},
    ]
    optimizer = AdamW(groups, lr=learning_rate, betas=betas, fused=True)
    for group in optimizer.param_groups:
        group["initial_lr"] = learning_rate
    return optimizer


def update(optimizer: Optimizer, loss: Tensor) -> None:
    """One step down the gradient of `loss`, which reaches the optimizer's own parameters alone."""
    optimizer.zero_grad()
    loss.backward(inputs=[parameter for group in optimizer.param_groups for parameter in group["params"]])
    clip_gradients(optimizer)
    optimizer.step()


def clip_gradients(optimizer: Optimizer) -> None:
    """Clamps every gradient element of the groups that have a `gradient_clip` to plus or minus that value."""
    for group in optimizer.param_groups:
        if group["gradient_clip"] is not None:
            nn.utils.clip_grad_value_(group["params"], group["gradient_clip"])


@torch.no_grad()
def batch_psnr(images: Tensor, logits: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, the mean over images [B, 3, H, W] in [0, 1], as a scalar tensor."""
    error = (logits.sigmoid() - images).square().flatten(1).mean(dim=1)
    return -10.0 * error.clamp(min=10.0 ** (-PSNR_CAP / 10.0)).log10().mean()
