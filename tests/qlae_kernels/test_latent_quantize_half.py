"""Half precision: autocast, half modules and scaled losses; called, traced and compiled alike."""

from collections.abc import Callable

import pytest
import torch
from backend_variants import each_backend
from latent_quantize_statement import assert_same_bits, assert_within, gradients, nearest, quantized_at
from on_device import device_of
from torch import Tensor, nn

from qlae_kernels import FusedLatentQuantizer
from qlae_kernels.latent_quantize_ops import latent_quantize_op

WEIGHTS = {"quantization_weight": 0.75, "commitment_weight": 0.25}
halves = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])


def called(quantizer: FusedLatentQuantizer, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return quantizer(z)


def as_op(quantizer: FusedLatentQuantizer, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    weights = (quantizer.quantization_weight, quantizer.commitment_weight)
    return latent_quantize_op(z, quantizer.codebook, None, 1, *weights, torch.int32, True, quantizer.backend)


def compiled(quantizer: FusedLatentQuantizer, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    torch.compiler.reset()
    return torch.compile(quantizer, fullgraph=True, backend="aot_eager")(z)


paths = pytest.mark.parametrize("path", [called, as_op, compiled], ids=lambda path: path.__name__)
Path = Callable[[FusedLatentQuantizer, Tensor], tuple[Tensor, Tensor, Tensor]]


def latents(dtype: torch.dtype, backend: str) -> Tensor:
    return torch.randn(400, 3, generator=torch.Generator().manual_seed(0)).mul(0.3).to(device_of(backend), dtype)


@halves
@paths
@each_backend
def test_under_autocast_codes_stay_in_float32(backend: str, path: Path, dtype: torch.dtype) -> None:
    device = device_of(backend)
    quantizer = FusedLatentQuantizer(3, 1000, backend=backend, device=device, **WEIGHTS)
    linear = nn.Linear(3, 3, device=device)
    with torch.autocast(device.type, dtype):
        z = linear(latents(torch.float32, backend)).detach().requires_grad_()
        assert z.dtype is dtype
        quantized, indices, loss = path(quantizer, z)
        (quantized.float().sum() + loss).backward()
    assert loss.dtype is torch.float32
    codebook = quantizer.codebook.detach()
    want = nearest(z.cpu(), codebook.cpu())
    assert_same_bits(indices.cpu(), want.int())
    assert_same_bits(quantized.cpu(), quantized_at(want, z.cpu(), codebook.cpu()))
    expected = gradients(z.cpu(), codebook.cpu(), torch.ones_like(z.cpu()), 1.0, **WEIGHTS)
    assert_within(z.grad.cpu(), expected.grad_z, expected.grad_z_bound)
    assert quantizer.codebook.grad.dtype is torch.float32
    assert_within(quantizer.codebook.grad.cpu(), expected.grad_codebook, expected.grad_codebook_bound)


@halves
@paths
@each_backend
def test_a_half_module_computes_in_float32(backend: str, path: Path, dtype: torch.dtype) -> None:
    quantizer = FusedLatentQuantizer(3, 10, backend=backend, device=device_of(backend), **WEIGHTS).to(dtype)
    z = latents(dtype, backend).requires_grad_()
    quantized, indices, loss = path(quantizer, z)
    (quantized.float().sum() + loss).backward()
    codebook = quantizer.codebook.detach()
    assert codebook.dtype is quantizer.codebook.grad.dtype is z.grad.dtype is dtype
    assert loss.dtype is torch.float32
    assert_same_bits(indices.cpu(), nearest(z.cpu(), codebook.cpu()).int())
    # A code of the half type is a value of z's.
    assert_same_bits(quantized.cpu(), quantized_at(indices.cpu(), z.cpu(), codebook.cpu()))
    expected = gradients(z.cpu(), codebook.cpu(), torch.ones_like(z.cpu()), 1.0, **WEIGHTS)
    assert_within(loss.cpu(), expected.loss, expected.loss_bound)
    assert_within(z.grad.cpu(), expected.grad_z, expected.grad_z_bound)
    assert_within(quantizer.codebook.grad.cpu(), expected.grad_codebook, expected.grad_codebook_bound)


@paths
@each_backend
def test_a_scaled_loss_does_not_overflow(backend: str, path: Path) -> None:
    # The scale passes float16's largest value, 65504; the gradients that it leads to do not.
    scale = 2.0**20
    quantizer = FusedLatentQuantizer(3, 10, backend=backend, device=device_of(backend), **WEIGHTS).half()
    z = latents(torch.float16, backend).requires_grad_()
    loss = path(quantizer, z)[2]
    (loss * scale).backward()
    expected = gradients(z.cpu(), quantizer.codebook.cpu(), None, scale, **WEIGHTS)
    assert z.grad.isfinite().all()
    assert_within(z.grad.cpu(), expected.grad_z, expected.grad_z_bound)
    assert_within(quantizer.codebook.grad.cpu(), expected.grad_codebook, expected.grad_codebook_bound)


@halves
@each_backend
def test_packed_indices_are_exact(backend: str, dtype: torch.dtype) -> None:
    quantizer = FusedLatentQuantizer(3, 1000, backend=backend, device=device_of(backend))
    indices = (
        torch.arange(1000, device=device_of(backend)).unsqueeze(1)
        * torch.tensor([1, 7, 13], device=device_of(backend))
        % 1000
    )
    for module in (quantizer, FusedLatentQuantizer(3, 1000, device=device_of(backend)).to(dtype)):
        with torch.autocast(device_of(backend).type, dtype):
            codes = module.pack(indices)
            assert codes.tolist() == [a + 1000 * b + 1000_000 * c for a, b, c in indices.tolist()]
            assert torch.equal(module.unpack(codes), indices)
    with torch.autocast(device_of(backend).type, dtype):
        # Under autocast the codes stay in float32, so none is lost between decoding and encoding.
        assert torch.equal(quantizer.encode(quantizer.decode(indices)), indices)


@each_backend
def test_grad_scaler_steps_like_an_unscaled_optimizer(backend: str) -> None:
    device = device_of(backend)
    codebooks = []
    for enabled in (True, False):
        quantizer = FusedLatentQuantizer(3, 10, backend=backend, device=device, **WEIGHTS)
        optimizer = torch.optim.SGD(quantizer.parameters(), lr=1.0)
        scaler = torch.amp.GradScaler(device.type, init_scale=2.0**16, enabled=enabled)
        with torch.autocast(device.type, torch.float16):
            loss = quantizer(latents(torch.float16, backend)).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        codebooks.append(quantizer.codebook.detach())
    torch.testing.assert_close(*codebooks)
    assert not torch.equal(codebooks[0], FusedLatentQuantizer(3, 10, device=device).codebook)
