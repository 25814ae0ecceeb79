"""A whole training step of the paper's batch, with the fused quantizer and with the plain PyTorch one."""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from qlae.config import TrainConfig
from qlae.methods import Method, build_method

BATCH = 128
BACKENDS = ("auto", "reference")


def make_method(network: str, size: int, backend: str) -> tuple[Method, Tensor]:
    """A newly initialised method and one batch, the same for every backend."""
    torch.manual_seed(0)
    method = build_method(TrainConfig(network=network, num_latents=12), (3, size, size))
    method.latent.quantizer.backend = backend
    return method, torch.rand(BATCH, 3, size, size)


def assert_contenders_agree(network: str, size: int) -> None:
    losses = []
    for backend in BACKENDS:
        method, images = make_method(network, size, backend)
        losses.append(method.training_step(images)["loss"])
    # one float32 sum over 1,536 latents, in another order
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("network", "size"), [("compact", 16), ("compact", 32)])
def test_train_step(benchmark: BenchmarkFixture, network: str, size: int, backend: str) -> None:
    assert_contenders_agree(network, size)
    benchmark.group = f"training step, {network}, {BATCH} x 3 x {size} x {size}"
    method, images = make_method(network, size, backend)
    benchmark(method.training_step, images)
