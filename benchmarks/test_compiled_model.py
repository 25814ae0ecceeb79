"""A compiled model's forward and backward pass, with the fused quantizer and with the plain lines compiled in."""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from latent_quantize_peers import plain_latent_quantize
from measurement import Plan, Task, median_and_quartiles, synchronize, time_interleaved
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn
from torch.nn import functional

from qlae.config import TrainConfig
from qlae.methods import build_method
from qlae_kernels import FusedLatentQuantizer, latent_quantize

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Quantize = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
CONTENDERS: dict[str, Quantize] = {"fused": latent_quantize, "plain": plain_latent_quantize}
# Network, size of the images, batch. `linear` takes patches of an image for samples: many latents, little else.
SIZES = [("compact", 16, 128), ("compact", 32, 128), ("compact", 16, 1024), ("linear", 4, 65_536)]


def networks(network: str, size: int) -> tuple[nn.Module, nn.Module]:
    """Encoder and decoder between images [batch, 3, size, size] and 12 latents: those of a QLAE, or one layer each."""
    if network == "linear":
        shape = (3, size, size)
        encoder = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), 12))
        return encoder, nn.Sequential(nn.Linear(12, math.prod(shape)), nn.Unflatten(1, shape))
    method = build_method(TrainConfig(network=network, num_latents=12), (3, size, size))
    return method.encoder, method.decoder


class Model(nn.Module):
    """Networks around `quantize`; returns indices and the objective."""

    def __init__(self, network: str, size: int, quantize: Quantize) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.decoder = networks(network, size)
        self.codebook = FusedLatentQuantizer(12).codebook
        self.quantize = quantize

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        quantized, indices, loss = self.quantize(self.encoder(images), self.codebook)
        return indices, functional.binary_cross_entropy_with_logits(self.decoder(quantized), images) + loss


@pytest.fixture(autouse=True)
def fresh_compiler_caches() -> Iterator[None]:
    yield
    torch.compiler.reset()


def make_models(network: str, size: int, batch: int) -> tuple[dict[str, nn.Module], Tensor]:
    """Every contender's model, compiled, with the same weights, and one batch of images."""
    images = torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    models = {name: Model(network, size, quantize).to(DEVICE) for name, quantize in CONTENDERS.items()}
    return {name: torch.compile(model, fullgraph=True) for name, model in models.items()}, images


def step(model: nn.Module, images: Tensor) -> Tensor:
    """Forward and backward; returns the indices."""
    model.zero_grad()
    indices, objective = model(images)
    objective.backward()
    return indices


def assert_contenders_agree(models: dict[str, nn.Module], images: Tensor) -> None:
    indices = {name: step(model, images) for name, model in models.items()}
    # The encoders may be rounded otherwise, which moves latents that lie between two codes.
    assert (indices["fused"] == indices["plain"]).double().mean() > 0.999
    for one, other in zip(models["fused"].parameters(), models["plain"].parameters(), strict=True):
        assert (one.grad - other.grad).norm() <= 0.02 * other.grad.norm()


@pytest.mark.parametrize(("network", "size", "batch"), SIZES)
def test_compiled_model(benchmark: BenchmarkFixture, network: str, size: int, batch: int) -> None:
    benchmark.group = f"compiled model, {network}, {batch} x 3 x {size} x {size}, {DEVICE.type}"
    models, images = make_models(network, size, batch)
    assert_contenders_agree(models, images)

    def fused_step() -> None:
        step(models["fused"], images)
        synchronize(DEVICE)

    if benchmark.enabled:
        tasks = {name: Task(lambda model=model: step(model, images)) for name, model in models.items()}
        timings = time_interleaved(tasks, Plan(seconds=5.0), DEVICE)
        for name, timing in timings.items():
            benchmark.extra_info[f"{name}_median_and_quartiles_s"] = median_and_quartiles(timing.samples)
        ratios = [p / f for p, f in zip(timings["plain"].samples, timings["fused"].samples, strict=True)]
        benchmark.extra_info["plain_over_fused_median_and_quartiles"] = median_and_quartiles(ratios)
    benchmark(fused_step)
