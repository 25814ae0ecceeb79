"""What every training method offers, and the optimizer that the paper trains them all with."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from qlae.metrics import PSNR_CAP
from qlae_kernels import FusedLatentQuantizer


class Method(nn.Module, ABC):
    """A model that codes images by quantized latents, together with the way it learns.

    Attributes:
        encoder: images float32 [B, 3, H, W] in [0, 1] -> [B, D].
        decoder: [B, D] -> logits [B, 3, H, W].
        quantizer: [B, D] -> the nearest codes.
        optimizers: by name; a checkpoint keeps the state of each.
    """

    encoder: nn.Module
    decoder: nn.Module
    quantizer: FusedLatentQuantizer
    optimizers: dict[str, Optimizer]

    @abstractmethod
    def training_step(self, images: Tensor) -> dict[str, Tensor]:
        """Learns from one batch, float32 [B, 3, H, W] in [0, 1]: all forward and backward passes and updates.

        Returns:
            Detached scalars on the images' device. `loss` and `psnr` (dB) are always among them.
        """

    def set_learning_rate_factor(self, factor: float) -> None:
        """Every learning rate becomes `factor` times the one its optimizer was made with."""
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = factor * group["initial_lr"]

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Code indices [B, D] of images [B, 3, H, W]."""
        return self.quantizer.encode(self.encoder(images))

    @torch.no_grad()
    def decode_indices(self, indices: Tensor) -> Tensor:
        """Images float32 [B, 3, H, W] in [0, 1] of code indices [B, D]."""
        return self.decoder(self.quantizer.decode(indices)).sigmoid()

    def encode_and_reconstruct(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Code indices [B, D] of images [B, 3, H, W], and the images these indices stand for."""
        indices = self.encode(images)
        return indices, self.decode_indices(indices)

    def reconstruct(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] after encoding, quantization and decoding."""
        return self.encode_and_reconstruct(images)[1]


def split_parameters(method: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The regularized parameters, and the free ones: those named `bias` and the codebook.

    Weights of norms and a decoder's learned constant are regularized too, as in the paper's implementation.
    """
    regularized, free = [], []
    for name, parameter in method.named_parameters():
        is_free = name.split(".")[-1] == "bias" or name.startswith("quantizer.")
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
            `clip_gradients`.
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
