"""Latents of variational autoencoders: a Gaussian for each image, scored by its mean."""

import math

import torch
from torch import Tensor
from torch.nn import functional

from qlae.latents.continuous import ContinuousLatent


class GaussianLatent(ContinuousLatent):
    """Latents drawn from N(mean, sigma^2) in training; the codes are the means (Kingma & Welling, ICLR 2014).

    The features are the means, then as many numbers whose softplus is sigma. The loss term is
        kl = weight * mean over images of KL(N(mean, sigma^2) || N(0, I)), summed over the latents.
    """

    def __init__(self, num_latents: int, *, weight: float) -> None:
        super().__init__(num_latents)
        self.features = 2 * num_latents
        self.weight = weight

    def forward(self, features: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        mean, sigma = self.distribution(features)
        values = mean + sigma * torch.randn_like(mean)
        return values, self.terms(values, mean, sigma)

    def distribution(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and sigma, each [B, D], of features [B, 2 D]."""
        mean, spread = features.chunk(2, dim=1)
        return mean, functional.softplus(spread)

    def terms(self, values: Tensor, mean: Tensor, sigma: Tensor) -> dict[str, Tensor]:
        """Loss terms of `values` [B, D] drawn from N(mean, sigma^2)."""
        divergence = 0.5 * (mean.square() + sigma.square() - 1.0) - sigma.log()
        return {"kl": self.weight * divergence.sum(dim=1).mean()}

    def encode(self, features: Tensor) -> Tensor:
        return self.distribution(features)[0]

    def describe(self) -> str:
        return f"{self.num_latents} Gaussian latents"


class TotalCorrelationLatent(GaussianLatent):
    """Gaussian latents whose divergence is taken apart (Chen et al., NeurIPS 2018, beta-TCVAE).

    With q(z) and q(z_d) estimated from the batch, as the mean over its images of q(z | image):
        mutual_information = weight * mean(log q(z | image) - log q(z))
        total_correlation = weight * beta * mean(log q(z) - sum over d of log q(z_d))
        dimension_wise_kl = weight * mean(sum over d of log q(z_d) - log p(z))
    The estimator by Chen et al. also divides by the number of training images; its logarithm shifts the terms by
    constants without gradient, and is left out.
    """

    def __init__(self, num_latents: int, *, weight: float, beta: float) -> None:
        super().__init__(num_latents, weight=weight)
        self.beta = beta

    def terms(self, values: Tensor, mean: Tensor, sigma: Tensor) -> dict[str, Tensor]:
        # [B, B, D]: the drawn values of one image under the Gaussian of another
        densities = log_normal(values[:, None], mean[None], sigma[None])
        images = math.log(len(values))
        joint = densities.sum(dim=2).logsumexp(dim=1) - images
        marginals = (densities.logsumexp(dim=1) - images).sum(dim=1)
        conditional = log_normal(values, mean, sigma).sum(dim=1)
        prior = log_normal(values, torch.zeros_like(mean), torch.ones_like(sigma)).sum(dim=1)
        return {
            "mutual_information": self.weight * (conditional - joint).mean(),
            "total_correlation": self.weight * self.beta * (joint - marginals).mean(),
            "dimension_wise_kl": self.weight * (marginals - prior).mean(),
        }


def log_normal(values: Tensor, mean: Tensor, sigma: Tensor) -> Tensor:
    """Log density of N(mean, sigma^2) at `values`, element by element."""
    return -0.5 * ((values - mean) / sigma).square() - sigma.log() - 0.5 * math.log(2.0 * math.pi)
