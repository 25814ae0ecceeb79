"""Positions that do not count: the same as if they were not there."""

import pytest
import torch
from backend_variants import each_backend
from latent_quantize_statement import assert_same_bits
from on_device import device_of, on_backend, to_device
from torch import Tensor
from torch.func import functional_call, grad, hessian, vmap

from qlae_kernels import FusedLatentQuantizer, LatentQuantizerOutput, latent_quantize

WEIGHTS = {"quantization_weight": 0.75, "commitment_weight": 0.25}
LEVELS = [7, 2, 5]


def problem(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """z [4, 3, 5, 2], codebook [3, 7] whose first codes are no half numbers, and a mask [4, 5, 2] of 40 positions."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(4, 3, 5, 2, generator=generator).to(dtype)
    compute = torch.float64 if dtype is torch.float64 else torch.float32
    codebook = torch.randn(3, 7, generator=generator, dtype=compute)
    mask = torch.rand(4, 5, 2, generator=generator) < 0.6
    assert 0 < mask.sum() < 40
    return z, codebook, mask


def counted(tensor: Tensor, mask: Tensor) -> Tensor:
    """[n, 3]: the positions of [4, 3, 5, 2] that count."""
    return tensor.movedim(1, -1)[mask]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_the_others_are_quantized_as_if_alone(backend: str, dtype: torch.dtype) -> None:
    z, codebook, mask = problem(dtype)
    weight = torch.randn(z.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    z.movedim(1, -1)[~mask] = torch.nan
    leaves = [on_backend(tensor.clone().requires_grad_(), backend) for tensor in (z, codebook)]
    device = device_of(backend)
    options = {**WEIGHTS, "levels": LEVELS, "backend": backend}
    got = latent_quantize(*leaves, mask=mask.to(device), **options)
    gradients = torch.autograd.grad((got.quantized * weight.to(device)).sum() + got.loss, leaves)

    rows = counted(z, mask).contiguous()
    alone = [tensor.clone().requires_grad_() for tensor in (rows, codebook)]
    want = latent_quantize(*alone, **options | {"backend": "reference"})
    objective = (want.quantized * counted(weight, mask)).sum() + want.loss
    want_z, want_codebook = torch.autograd.grad(objective, alone)

    quantized, indices, loss = (to_device(each.detach(), torch.device("cpu")) for each in got)
    assert quantized.dtype is dtype and loss.dtype is codebook.dtype
    assert_same_bits(counted(quantized, mask), want.quantized.detach())
    assert_same_bits(counted(indices, mask), want.indices)
    torch.testing.assert_close(loss, want.loss.detach())
    grad_z, grad_codebook = (to_device(each, torch.device("cpu")) for each in gradients)
    torch.testing.assert_close(counted(grad_z, mask), want_z)
    torch.testing.assert_close(grad_codebook, want_codebook)
    for left_out in (quantized, indices, grad_z):
        assert not left_out.movedim(1, -1)[~mask].any()


@each_backend
@pytest.mark.parametrize("shared", [False, True], ids=["codebooks", "shared"])
def test_channels_may_be_last(backend: str, shared: bool) -> None:
    device = device_of(backend)
    quantizer = FusedLatentQuantizer(3, 6, channel_dim=-1, shared_codebook=shared, backend=backend, device=device)
    z = torch.randn(4, 9, 3, device=device)
    mask = torch.rand(4, 9, device=device) < 0.5
    quantized, indices, loss = quantizer(z, mask)
    want = quantizer(z[mask].unsqueeze(0))
    assert_same_bits(quantized[mask], want.quantized[0])
    assert_same_bits(indices[mask], want.indices[0])
    torch.testing.assert_close(loss, want.loss)


def test_where_all_count_nothing_changes(backend: str) -> None:
    z, codebook, mask = (on_backend(tensor, backend) for tensor in problem())
    got = latent_quantize(z, codebook, mask=torch.ones_like(mask), backend=backend)
    for one, other in zip(got, latent_quantize(z, codebook, backend=backend), strict=True):
        assert_same_bits(one, other)


@pytest.mark.parametrize("batch", [4, 0])
def test_where_none_counts_there_is_no_loss_and_no_gradient(backend: str, batch: int) -> None:
    z, codebook, mask = (on_backend(tensor, backend) for tensor in problem())
    z, mask = z[:batch].clone().fill_(torch.inf).requires_grad_(), torch.zeros_like(mask[:batch])
    codebook.requires_grad_()
    quantized, _, loss = latent_quantize(z, codebook, mask=mask, backend=backend)
    assert loss.item() == 0.0
    grad_z, grad_codebook = torch.autograd.grad(quantized.sum() + loss, (z, codebook))
    assert not grad_z.any() and not grad_codebook.any() and not quantized.any()


def test_an_infinite_code_is_no_more_used_than_without_a_mask(backend: str) -> None:
    z, codebook, mask = (on_backend(tensor, backend) for tensor in problem())
    codebook[0, 0], codebook[1, :2], codebook[2, 3] = torch.inf, -torch.inf, torch.inf
    codebook.requires_grad_()
    loss = latent_quantize(z, codebook, mask=mask, backend=backend).loss
    alone = latent_quantize(counted(z, mask).contiguous(), codebook, backend=backend).loss
    assert alone.isfinite()
    torch.testing.assert_close(loss, alone)
    gradients = [torch.autograd.grad(each, codebook)[0] for each in (loss, alone)]
    torch.testing.assert_close(*gradients)


def test_the_layout_of_the_latents_is_kept(backend: str) -> None:
    z, codebook, mask = (on_backend(tensor, backend) for tensor in problem())
    for laid_out in (z.to(memory_format=torch.channels_last), z.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)):
        laid_out = laid_out.detach().requires_grad_()
        quantized, indices, loss = latent_quantize(laid_out, codebook, mask=mask, backend=backend)
        (quantized.sum() + loss).backward()
        assert quantized.stride() == indices.stride() == laid_out.grad.stride() == laid_out.stride()
        for one, other in zip((quantized, indices), latent_quantize(z, codebook, mask=mask), strict=False):
            assert_same_bits(one, other)


def second_order_problem(backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """z [6, 2] far from where indices jump, a codebook [2, 3], and a mask [6] that leaves out each code's use."""
    codebook = torch.tensor([[-0.5, 0.5, 1.5], [1.0, -1.0, 0.0]], dtype=torch.float64)
    z = [[-0.45, 0.8], [0.4, -0.9], [-0.3, 0.2], [7.0, 0.9], [-0.6, 1.2], [1.4, -0.1]]
    mask = torch.tensor([True, True, False, False, True, False])
    tensors = (torch.tensor(z, dtype=torch.float64), codebook, mask)
    return tuple(on_backend(tensor, backend) for tensor in tensors)


def test_gradgradcheck_with_a_mask(backend: str) -> None:
    z, codebook, mask = second_order_problem(backend)

    def values_and_loss(z: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
        return latent_quantize(z, codebook, mask=mask, backend=backend, **WEIGHTS)[0::2]

    assert torch.autograd.gradgradcheck(values_and_loss, (z.requires_grad_(), codebook.requires_grad_()))


def loss_of_all(z: Tensor, codebook: Tensor, mask: Tensor | None, backend: str) -> Tensor:
    quantized, _, loss = latent_quantize(z, codebook, mask=mask, backend=backend, **WEIGHTS)
    return quantized.pow(3).sum() + loss


@pytest.mark.parametrize("way", ["create_graph", "torch.func", "torch.func compiled"])
def test_second_derivatives_are_those_of_the_counted_alone(backend: str, way: str) -> None:
    z, codebook, mask = second_order_problem(backend)
    torch.compiler.reset()

    def second(z: Tensor, codebook: Tensor, mask: Tensor | None) -> list[Tensor]:
        def objective(z: Tensor, codebook: Tensor) -> Tensor:
            return loss_of_all(z, codebook, mask, backend)

        if way == "create_graph":
            results = torch.autograd.functional.hessian(objective, (z, codebook))
        elif way == "torch.func":
            results = hessian(objective, argnums=(0, 1))(z, codebook)
        else:
            compiled = torch.compile(hessian(objective, argnums=(0, 1)), fullgraph=True, backend="aot_eager")
            results = compiled(z, codebook)
        return [result for row in results for result in row]

    by_z, by_both, by_codebook_and_z, by_codebook = second(z, codebook, mask)
    want = second(z[mask], codebook, None)
    torch.testing.assert_close(by_z[mask][:, :, mask], want[0])
    torch.testing.assert_close(by_both[mask], want[1])
    torch.testing.assert_close(by_codebook_and_z[:, :, mask], want[2])
    torch.testing.assert_close(by_codebook, want[3])
    # Twice the weight times the share of the three counted positions that the code has: two, one, none; and so on.
    shares = torch.tensor([2, 1, 0, 2, 1, 0], dtype=torch.float64, device=z.device) / 6
    torch.testing.assert_close(by_codebook.reshape(6, 6), (2 * WEIGHTS["quantization_weight"] * shares).diag())
    for left_out in (by_z[~mask], by_z[:, :, ~mask], by_both[~mask], by_codebook_and_z[:, :, ~mask]):
        assert not left_out.any()


def test_gradients_per_sample_with_masks() -> None:
    quantizer = FusedLatentQuantizer(3, 5, channel_dim=-1)
    z, mask = torch.randn(4, 6, 3), torch.rand(4, 6) < 0.5
    parameters = {"codebook": quantizer.codebook.detach()}
    per_sample = vmap(grad(lambda p, z, m: functional_call(quantizer, p, (z, m)).loss), in_dims=(None, 0, 0))
    for got, one, its_mask in zip(per_sample(parameters, z, mask)["codebook"], z, mask, strict=True):
        (want,) = torch.autograd.grad(quantizer(one, its_mask).loss, quantizer.codebook)
        torch.testing.assert_close(got, want)


@each_backend
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_call_with_a_mask(backend: str, memory_format: torch.memory_format, dynamic: bool) -> None:
    z, codebook, mask = (on_backend(tensor, backend) for tensor in problem())
    z = z.contiguous(memory_format=memory_format)
    torch.compiler.reset()

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=dynamic)
    def quantize(z: Tensor, codebook: Tensor, mask: Tensor) -> LatentQuantizerOutput:
        return latent_quantize(z, codebook, mask=mask, backend=backend)

    want = latent_quantize(z, codebook, mask=mask, backend=backend)
    for one, other in zip(quantize(z, codebook, mask), want, strict=True):
        assert_same_bits(one, other)
        assert one.stride() == other.stride()


@each_backend
def test_without_indices(backend: str) -> None:
    z, codebook, mask = (on_backend(tensor, backend) for tensor in problem())
    assert latent_quantize(z, codebook, mask=mask, return_indices=False, backend=backend).indices is None


@pytest.mark.parametrize(
    ("mask", "error", "named"),
    [
        (torch.ones(4, 5, 2), TypeError, "torch.float32"),
        ([True], TypeError, "list"),
        (torch.ones(4, 3, 5, 2, dtype=torch.bool), ValueError, "(4, 5, 2)"),
        (torch.ones(5, 2, dtype=torch.bool), ValueError, "(5, 2)"),
        (torch.ones(4, 5, 2, dtype=torch.bool, device="meta"), ValueError, "meta"),
    ],
    ids=["float", "list", "of z's shape", "broadcast", "device"],
)
def test_a_mask_that_does_not_fit_is_refused(mask: object, error: type[Exception], named: str) -> None:
    z, codebook, _ = problem()
    with pytest.raises(error) as raised:
        latent_quantize(z, codebook, mask=mask)
    assert named in str(raised.value) and "mask" in str(raised.value)
