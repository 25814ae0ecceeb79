"""What the op promises, for every backend with every instruction set."""

import math
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from backend_variants import each_backend
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from latent_quantize_statement import (
    INDEX_DTYPES,
    VALUE_DTYPES,
    assert_same_bits,
    assert_within,
    compute_dtype,
    gradients,
    nearest,
    quantized_at,
    surrogate,
)
from on_device import device_of, latent_quantize, on_backend
from torch import Tensor

import qlae_kernels
from qlae_kernels import LatentQuantizerOutput, available_backends
from qlae_kernels.backends import unavailable_reason

pytestmark = pytest.mark.usefixtures("poisoned_memory")

WEIGHTS = {"quantization_weight": 0.75, "commitment_weight": 0.25}
dtypes = pytest.mark.parametrize("dtype", VALUE_DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))

# The same examples in every run.
examples = settings(
    deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def bits_dtype(dtype: torch.dtype) -> torch.dtype:
    return {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]


def even(levels: int) -> list[float]:
    return torch.linspace(-0.5, 0.5, levels, dtype=torch.float64).tolist()


def uneven(levels: int, seed: int) -> list[float]:
    return torch.randn(levels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist()


def codebook_rows(name: str, compute: torch.dtype) -> list[list[float]]:
    """Rows of one length, one for each latent."""
    info = torch.finfo(compute)
    eps, most, least = info.eps, info.max, info.smallest_normal * info.eps
    inf, nan = math.inf, math.nan
    rows = {
        "one": [[0.25], [-3.0]],
        "two": [[-0.5, 0.5], [0.5, -0.5], [0.1, 0.1]],
        "ten": [even(10), even(10)[::-1], uneven(10, 0), sorted(uneven(10, 1))],
        # Around the largest codebooks that are searched by thresholds, for 128, 256 and 512 bits.
        "8": [uneven(8, 2)],
        "9": [uneven(9, 3)],
        "16": [uneven(16, 4), even(16)],
        "17": [uneven(17, 5), even(17)],
        "32": [even(32), uneven(32, 6)],
        "33": [even(33), uneven(33, 7)],
        "64": [even(64), uneven(64, 8)],
        "65": [even(65), uneven(65, 9), [0.001 * k for k in range(64)] + [60.0]],
        "300": [even(300), sorted(uneven(300, 10)), uneven(300, 11)],
        "duplicates": [[0.3, 0.1, 0.3, 0.1, 0.2, 0.3], [0.5, 0.5, 0.5, -0.5, -0.5, -0.5], [0.2] * 6],
        "many duplicates": [(even(25) * 4)[:100], uneven(50, 12) * 2],
        "signed zeros": [[-0.0, 0.0, 1.0], [0.0, -0.0, -1.0], [1.0, 0.0, -0.0], [-1.0, -0.0, 0.0]],
        "closer than an ulp of z": [
            [1.0, 1.0 + eps, 100.0],
            [100.0, 1.0 + eps, 1.0],
            [1.0 + eps, 1.0, 100.0],
            [1.0, 100.0, 1.0 + 3 * eps],
        ],
        "many closer than an ulp of z": [[1.0 + eps * k for k in range(99)] + [100.0]],
        "neighbouring floats": [[1.0, 1.0 + eps, 1.0 + 2 * eps], [1.0, 1.0 - eps / 2, 1.0 - eps], [0.0, least, -least]],
        "huge": [[-most, most, 0.0, 1.0], [most, -most, most / 2, -most / 2], [most / 4, -most / 4, most / 8, 1.0]],
        "subnormal": [[0.0, least, 2 * least, 5 * least], [-3 * least, 7 * least, 0.0, 100 * least]],
        "infinite": [[inf, 0.0, -inf, 1.0], [-inf, inf, inf, -inf], [0.0, 1.0, 2.0, inf], [inf] * 4],
        "nan": [[0.0, nan, 1.0, -1.0], [nan, 0.0, 1.0, 2.0], [0.0, 1.0, inf, nan], [nan] * 4],
        "one row with a nan": [even(10), [nan, *even(9)], uneven(10, 13)],
        "many with a nan": [[*even(99), nan], even(100)],
    }
    return rows[name]


CODEBOOKS = (
    "one",
    "two",
    "ten",
    "8",
    "9",
    "16",
    "17",
    "32",
    "33",
    "64",
    "65",
    "300",
    "duplicates",
    "many duplicates",
    "signed zeros",
    "closer than an ulp of z",
    "many closer than an ulp of z",
    "neighbouring floats",
    "huge",
    "subnormal",
    "infinite",
    "nan",
    "one row with a nan",
    "many with a nan",
)


def hostile_latents(codebook: Tensor, dtype: torch.dtype) -> Tensor:
    """Values [N, D] around every code and every midpoint, a few units in the last place off, and the far ends."""
    info = torch.finfo(dtype)
    codes = codebook.double().sort(1).values
    neighbours = codes[:, :1].mul(0.5) if codes.size(1) == 1 else codes[:, 1:] / 2 + codes[:, :-1] / 2
    centres = torch.cat((codes, neighbours, torch.full_like(codes[:, :1], 40.0)), 1).to(dtype).contiguous()
    reach = torch.arange(-6, 7) if centres.size(1) < 100 else torch.arange(-1, 2)
    around = (centres.view(bits_dtype(dtype)).unsqueeze(-1) + reach.to(bits_dtype(dtype))).view(dtype).flatten(1)
    far = [0.0, -0.0, 1e4, -1e4, 38.7, info.max, -info.max, info.max / 3, info.smallest_normal, info.tiny * info.eps]
    far += [math.inf, -math.inf, math.nan]
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(codebook.size(0), 50, generator=generator, dtype=torch.float64).to(dtype)
    ends = torch.tensor(far, dtype=torch.float64).to(dtype).expand(codebook.size(0), -1)
    return torch.cat((around, ends, spread), 1).T.contiguous()


def few_and_many(z: Tensor) -> Iterator[Tensor]:
    """All of z [N, D], once in pieces with few samples, once repeated to more than a thousand."""
    yield from z.split(200)
    yield z.repeat(-(-1100 // z.size(0)), 1)


@dtypes
@pytest.mark.parametrize("name", CODEBOOKS)
def test_index_and_code_are_those_of_argmin(backend: str, dtype: torch.dtype, name: str) -> None:
    codebook = torch.tensor(codebook_rows(name, compute_dtype(dtype)), dtype=compute_dtype(dtype))
    for z in few_and_many(hostile_latents(codebook, dtype)):
        indices = nearest(z, codebook)
        output = latent_quantize(z, codebook, backend=backend)
        assert_same_bits(output.indices, indices.to(torch.int32))
        assert_same_bits(output.quantized, quantized_at(indices, z, codebook))


@dtypes
def test_only_the_levels_of_a_latent_count(backend: str, dtype: torch.dtype) -> None:
    levels = (1, 10, 4, 33, 40)
    codebook = torch.randn(5, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    codebook[2, 5], codebook[0, 7], codebook[3, 33:] = math.nan, math.inf, 0.0
    codebook = codebook.to(compute_dtype(dtype))
    z = torch.randn(1200, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)
    for part in (z[:100], z):
        indices = nearest(part, codebook, levels=levels)
        output = latent_quantize(part, codebook, levels=levels, backend=backend)
        assert_same_bits(output.indices, indices.to(torch.int32))
        assert_same_bits(output.quantized, quantized_at(indices, part, codebook))
        assert (output.indices < torch.tensor(levels)).all()


@pytest.mark.parametrize("levels", [10, 100])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_every_half_value(backend: str, dtype: torch.dtype, levels: int) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    rows = [even(levels), uneven(levels, 0), [1000.0 * code for code in uneven(levels, 1)]]
    codebook = torch.tensor(rows, dtype=torch.float64).float()
    # Two thirds of the codes are values that the half type has, so that exact ties occur.
    codebook[1:, ::2] = codebook[1:, ::2].to(dtype).float()
    z = every.unsqueeze(1).expand(-1, len(rows)).contiguous()
    indices = nearest(z, codebook)
    output = latent_quantize(z, codebook, index_dtype=torch.uint8, backend=backend)
    assert_same_bits(output.indices, indices.to(torch.uint8))
    assert_same_bits(output.quantized, quantized_at(indices, z, codebook))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_codes_round_to_nearest_even_on_the_way_to_a_half_type(backend: str, dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    every = every[every.isfinite()]
    # The float32 halfway between two values of the half type, its neighbours, and the values themselves.
    following = (every.to(dtype).view(torch.int16) + 1).view(dtype).float()
    halfway = every.double().add(following.double().nan_to_num(0.0, 65536.0, -65536.0)).div(2).float()
    codes = torch.cat((halfway, halfway.nextafter(every), halfway.nextafter(following), every)).unsqueeze(1)
    quantized = latent_quantize(torch.zeros(1, codes.size(0), dtype=dtype), codes, backend=backend).quantized
    assert_same_bits(quantized, codes.T.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_every_half_value_passes_through_the_gradient(backend: str, dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    z = every[every.isfinite()].unsqueeze(1).requires_grad_()
    # With one code at 0 and these weights the gradient of z is z itself: 2/M * M/2 * (z - 0).
    loss = latent_quantize(z, torch.zeros(1, 1), commitment_weight=z.numel() / 2, backend=backend).loss
    loss.backward()
    assert torch.equal(z.grad, z.detach())


@dtypes
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("samples", [3, 700])
@pytest.mark.parametrize("levels", [10, 100])
def test_a_latent_that_is_not_finite_shows(
    backend: str, dtype: torch.dtype, bad: float, samples: int, levels: int
) -> None:
    z = torch.full((samples, 3), 0.5, dtype=dtype)
    z[samples // 2, 1] = bad
    z.requires_grad_()
    codebook = torch.tensor(even(levels), dtype=compute_dtype(dtype)).repeat(3, 1).requires_grad_()
    output = latent_quantize(z, codebook, backend=backend)
    output.loss.backward()
    affected = torch.zeros(z.shape, dtype=torch.bool)
    affected[samples // 2, 1] = True
    assert torch.equal(output.quantized.isnan(), affected)
    assert (output.indices == torch.where(affected, 0, levels - 1)).all()
    assert not output.loss.isfinite()
    assert torch.equal(z.grad.isnan(), affected)
    # The code that the index names, and no other, takes the NaN.
    assert codebook.grad.isnan().nonzero().tolist() == [[1, 0]]


def problem(
    shape: tuple[int, ...], dtype: torch.dtype, channel_dim: int = 1, levels: int = 10, rows: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """z, a codebook and a gradient of `quantized`, all random."""
    generator = torch.Generator().manual_seed(sum(shape) + levels)
    z = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    num_latents = shape[channel_dim] if rows is None else rows
    codebook = torch.randn(num_latents, levels, generator=generator, dtype=torch.float64).to(compute_dtype(dtype))
    return z, codebook, torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


SHAPES = [
    pytest.param((1, 1), 1, 3, None, id="one element"),
    pytest.param((128, 12), 1, 10, None, id="the paper's batch"),
    pytest.param((700, 12), 1, 10, None, id="thresholds, periodic"),
    pytest.param((700, 5), 1, 100, None, id="cells, periodic"),
    pytest.param((600, 130), 1, 4, None, id="long period"),
    pytest.param((4, 3, 19, 13), 1, 10, None, id="runs with a rest"),
    pytest.param((3, 2, 4100), 1, 300, None, id="runs of more than a unit, cells"),
    pytest.param((1, 3, 70), 1, 33, None, id="runs, direct"),
    pytest.param((37, 6, 5), 1, 7, None, id="short inner dimension"),
    pytest.param((50, 7, 11), -1, 10, None, id="channels last"),
    pytest.param((6, 500), 0, 10, None, id="channels first"),
    pytest.param((60, 12), 1, 10, 1, id="shared, direct"),
    pytest.param((700, 5), 1, 100, 1, id="shared, cells"),
]


@dtypes
@pytest.mark.parametrize(("shape", "channel_dim", "levels", "rows"), SHAPES)
def test_loss_and_gradients_are_those_of_the_surrogate(
    backend: str, dtype: torch.dtype, shape: tuple[int, ...], channel_dim: int, levels: int, rows: int | None
) -> None:
    z, codebook, grad_quantized = problem(shape, dtype, channel_dim, levels, rows)
    expected = gradients(z, codebook, grad_quantized, 3.0, channel_dim=channel_dim, **WEIGHTS)
    z.requires_grad_()
    codebook.requires_grad_()
    output = latent_quantize(z, codebook, channel_dim=channel_dim, backend=backend, **WEIGHTS)
    assert output.loss.dtype is compute_dtype(dtype)
    assert output.loss.shape == ()
    torch.autograd.backward(
        (output.quantized, output.loss), (grad_quantized, torch.tensor(3.0, dtype=output.loss.dtype))
    )
    assert z.grad.dtype is dtype
    assert codebook.grad.dtype is codebook.dtype
    assert_within(output.loss, expected.loss, expected.loss_bound)
    assert_within(z.grad, expected.grad_z, expected.grad_z_bound)
    assert_within(codebook.grad, expected.grad_codebook, expected.grad_codebook_bound)


def test_gradient_of_a_codebook_of_every_size(backend: str) -> None:
    for levels in range(1, 80):
        z, codebook, _ = problem((530, 2), torch.float32, levels=levels)
        expected = gradients(z, codebook, None, 1.0, **WEIGHTS)
        codebook.requires_grad_()
        latent_quantize(z, codebook, backend=backend, **WEIGHTS).loss.backward()
        assert_within(codebook.grad, expected.grad_codebook, expected.grad_codebook_bound)


def test_ragged_levels_leave_the_padding_without_gradient(backend: str) -> None:
    levels = (1, 3, 20, 7)
    for samples in (20, 900):
        z, codebook, grad_quantized = problem((samples, 4), torch.float32, levels=20)
        expected = gradients(z, codebook, grad_quantized, 1.0, levels=levels, **WEIGHTS)
        z.requires_grad_()
        codebook.requires_grad_()
        output = latent_quantize(z, codebook, levels=levels, backend=backend, **WEIGHTS)
        torch.autograd.backward((output.quantized, output.loss), (grad_quantized, torch.tensor(1.0)))
        assert_within(z.grad, expected.grad_z, expected.grad_z_bound)
        assert_within(codebook.grad, expected.grad_codebook, expected.grad_codebook_bound)
        for row, count in zip(codebook.grad, levels, strict=True):
            assert (row[count:] == 0).all()


def test_a_weight_reaches_its_own_side_only(backend: str) -> None:
    z, codebook, _ = problem((50, 4), torch.float32)
    z.requires_grad_()
    codebook.requires_grad_()
    commitment = latent_quantize(z, codebook, quantization_weight=0.0, commitment_weight=1.0, backend=backend).loss
    grad_z, grad_codebook = torch.autograd.grad(commitment, (z, codebook))
    assert (grad_z != 0).any()
    assert (grad_codebook == 0).all()
    quantization = latent_quantize(z, codebook, quantization_weight=1.0, commitment_weight=0.0, backend=backend).loss
    grad_z, grad_codebook = torch.autograd.grad(quantization, (z, codebook))
    assert (grad_z == 0).all()
    assert (grad_codebook != 0).any()
    # Both have the value of the mean squared error.
    assert torch.equal(commitment, quantization)


@dtypes
def test_the_gradient_of_quantized_passes_straight_through(backend: str, dtype: torch.dtype) -> None:
    z, codebook, grad_quantized = problem((50, 4), dtype)
    z.requires_grad_()
    codebook.requires_grad_()
    latent_quantize(z, codebook, backend=backend).quantized.backward(grad_quantized)
    assert torch.equal(z.grad, grad_quantized)
    assert codebook.grad is None or (codebook.grad == 0).all()


@pytest.mark.parametrize("layout", ["transposed", "expanded", "strided"])
def test_the_gradient_of_quantized_may_have_any_layout(backend: str, layout: str) -> None:
    z, codebook, grad_quantized = problem((50, 4), torch.float32)
    if layout == "transposed":
        grad_quantized = grad_quantized.T.contiguous().T
    elif layout == "expanded":
        grad_quantized = grad_quantized[:1].expand(50, 4)
    else:
        grad_quantized = torch.stack((grad_quantized, grad_quantized), -1)[..., 1]
    assert not grad_quantized.is_contiguous()
    expected = gradients(z, codebook, grad_quantized, 1.0, **WEIGHTS)
    for latents in (z, z.T.contiguous().T):
        latents = latents.detach().requires_grad_()
        output = latent_quantize(latents, codebook, backend=backend, **WEIGHTS)
        grads = (grad_quantized, torch.tensor(1.0))
        (grad_z,) = torch.autograd.grad((output.quantized, output.loss), latents, grads)
        assert_within(grad_z, expected.grad_z, expected.grad_z_bound)


@pytest.mark.parametrize("need_codebook", [False, True])
@pytest.mark.parametrize("need_z", [False, True])
@pytest.mark.parametrize("use_quantized", [False, True])
@pytest.mark.parametrize("use_loss", [False, True])
def test_only_wanted_gradients_are_made(
    backend: str, need_z: bool, need_codebook: bool, use_quantized: bool, use_loss: bool
) -> None:
    z, codebook, grad_quantized = problem((40, 3), torch.float32)
    grads = (grad_quantized if use_quantized else None, 2.0 if use_loss else 0.0)
    expected = gradients(z, codebook, *grads, **WEIGHTS)
    z.requires_grad_(need_z)
    codebook.requires_grad_(need_codebook)
    output = latent_quantize(z, codebook, backend=backend, **WEIGHTS)
    assert output.quantized.requires_grad == output.loss.requires_grad == (need_z or need_codebook)
    assert not output.indices.requires_grad
    if not (need_z or need_codebook) or not (use_quantized or use_loss):
        return
    objective = 0.0
    if use_quantized:
        objective = objective + (output.quantized * grad_quantized).sum()
    if use_loss:
        objective = objective + 2.0 * output.loss
    objective.backward()
    assert (z.grad is not None) == need_z
    if need_z:
        assert_within(z.grad, expected.grad_z, expected.grad_z_bound)
    if need_codebook and use_loss:
        assert_within(codebook.grad, expected.grad_codebook, expected.grad_codebook_bound)
    if not need_codebook:
        assert codebook.grad is None


def test_gradients_accumulate_over_uses(backend: str) -> None:
    z, codebook, _ = problem((40, 3), torch.float64)
    z.requires_grad_()
    codebook.requires_grad_()
    once = torch.autograd.grad(latent_quantize(z, codebook, backend=backend).loss, (z, codebook))
    total = sum(latent_quantize(z, codebook, backend=backend).loss for _ in range(2))
    twice = torch.autograd.grad(total, (z, codebook))
    for one, two in zip(once, twice, strict=True):
        assert torch.equal(2 * one, two)


def test_backward_refuses_latents_that_were_changed(backend: str) -> None:
    z, codebook, _ = (on_backend(tensor, backend) for tensor in problem((40, 3), torch.float32))
    codebook.requires_grad_()
    output = qlae_kernels.latent_quantize(z, codebook, backend=backend)
    z.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.loss.backward()


@pytest.mark.parametrize("samples", [40, 40_000])
def test_outputs_may_be_changed_before_backward(backend: str, samples: int) -> None:
    z, codebook, _ = problem((samples, 3), torch.float32)
    expected = gradients(z, codebook, None, 1.0, **WEIGHTS)
    z, codebook = (on_backend(tensor, backend) for tensor in (z, codebook))
    z.requires_grad_()
    output = qlae_kernels.latent_quantize(z, codebook, backend=backend, **WEIGHTS)
    output.quantized.mul_(2)
    output.indices.zero_()
    output.loss.backward()
    assert_within(z.grad.cpu(), expected.grad_z, expected.grad_z_bound)


def away_from_boundaries(samples: int, num_latents: int, levels: int) -> tuple[Tensor, Tensor]:
    """Latents whose code stays the same within the steps of a numeric derivative, in float64."""
    codebook = torch.linspace(-1, 1, levels, dtype=torch.float64).repeat(num_latents, 1)
    gap = 2 / (levels - 1)
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(levels, (samples, num_latents), generator=generator)
    offset = (torch.rand(samples, num_latents, generator=generator, dtype=torch.float64) - 0.5) * 0.8 * gap
    z = codebook[0][index] + offset
    return z.requires_grad_(), codebook.requires_grad_()


def test_gradcheck_of_each_loss_on_its_own_side(backend: str) -> None:
    # The loss is a true function of z and codebook; its gradient is the true one where only the side whose weight is
    # not zero varies, and where no code changes.
    z, codebook = away_from_boundaries(5, 2, 4)

    def commitment(latents: Tensor) -> Tensor:
        return latent_quantize(
            latents, codebook.detach(), quantization_weight=0.0, commitment_weight=0.7, backend=backend
        ).loss

    def quantization(codes: Tensor) -> Tensor:
        return latent_quantize(z.detach(), codes, quantization_weight=0.7, commitment_weight=0.0, backend=backend).loss

    assert torch.autograd.gradcheck(commitment, z)
    assert torch.autograd.gradcheck(quantization, codebook)


def test_gradgradcheck_of_the_gradient_formulas(backend: str) -> None:
    # Differentiating the gradients numerically checks that they are functions of z, codebook and the incoming gradients
    # as the formulas say, straight-through part included.
    z, codebook = away_from_boundaries(5, 2, 4)

    def values_and_loss(latents: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        output = latent_quantize(latents, codes, backend=backend, **WEIGHTS)
        return output.quantized, output.loss

    assert torch.autograd.gradgradcheck(values_and_loss, (z, codebook))


def test_a_gradient_penalty_differentiates_through_the_quantizer(backend: str) -> None:
    z, codebook = away_from_boundaries(6, 3, 5)
    weight = torch.randn(3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def penalty(quantize: object) -> Tensor:
        quantized, loss = quantize(z, codebook)
        objective = (quantized.pow(3) @ weight).sum() + loss
        (grad_z,) = torch.autograd.grad(objective, z, create_graph=True)
        return torch.autograd.grad(grad_z.square().sum(), z)[0]

    def fused(latents: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        output = latent_quantize(latents, codes, backend=backend, **WEIGHTS)
        return output.quantized, output.loss

    def stated(latents: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        return surrogate(latents, codes, **WEIGHTS)

    torch.testing.assert_close(penalty(fused), penalty(stated), rtol=1e-12, atol=1e-14)


def test_saves_latents_and_codebook_only(backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    for z in (
        torch.randn(30, 4, generator=generator),
        torch.randn(4, 30, generator=generator).T,
        torch.randn(5, 4, 3, 2, generator=generator).to(memory_format=torch.channels_last),
    ):
        codebook = on_backend(torch.randn(4, 10, requires_grad=True), backend)
        z = on_backend(z, backend).requires_grad_()
        saved: list[Tensor] = []

        def remember(tensor: Tensor, saved: list[Tensor] = saved) -> Tensor:
            saved.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
            qlae_kernels.latent_quantize(z, codebook, backend=backend)
        assert {tensor.data_ptr() for tensor in saved} <= {z.data_ptr(), codebook.data_ptr()}


def memory_orders() -> list[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        ("transposed", torch.randn(4, 50, generator=generator).T),
        ("channels_last", torch.randn(3, 4, 5, 6, generator=generator).to(memory_format=torch.channels_last)),
        ("permuted", torch.randn(5, 4, 3, 2, generator=generator).permute(3, 1, 0, 2)),
        ("channel outermost", torch.randn(4, 3, 6, generator=generator).permute(1, 0, 2)),
        ("single samples", torch.randn(1, 4, 1, 7, generator=generator).to(memory_format=torch.channels_last)),
    ]


@pytest.mark.parametrize(("name", "z"), memory_orders(), ids=[name for name, _ in memory_orders()])
def test_dense_latents_keep_their_layout(backend: str, name: str, z: Tensor) -> None:
    codebook = torch.randn(4, 10, generator=torch.Generator().manual_seed(1))
    z = z.detach().requires_grad_()
    output = latent_quantize(z, codebook, backend=backend, **WEIGHTS)
    output.loss.backward()
    expected = gradients(z, codebook, None, 1.0, **WEIGHTS)
    assert_same_bits(output.indices, nearest(z, codebook).to(torch.int32))
    assert output.quantized.stride() == output.indices.stride() == z.stride()
    assert_within(z.grad, expected.grad_z, expected.grad_z_bound)


def test_latents_stored_negated(backend: str) -> None:
    codebook = torch.tensor([[-5.0, -0.1, 0.1, 5.0]])
    # The imaginary part of a conjugate is a view whose elements are stored with the other sign.
    z = torch.complex(torch.zeros(1, 1), torch.full((1, 1), 3.0)).conj().imag
    assert z.is_neg()
    assert latent_quantize(z, codebook, backend=backend).indices.item() == 0
    assert latent_quantize(torch._neg_view(torch.ones(3, 1)), codebook, backend=backend).indices.tolist() == [[1]] * 3
    codes = torch._neg_view(codebook)
    assert latent_quantize(torch.full((3, 1), 4.0), codes, backend=backend).indices.tolist() == [[0]] * 3


def test_gradients_stored_negated(backend: str) -> None:
    z, codebook, grad_quantized = problem((20, 3), torch.float32)
    expected = gradients(z, codebook, -grad_quantized, -1.0, **WEIGHTS)
    z.requires_grad_()
    codebook.requires_grad_()
    output = latent_quantize(z, codebook, backend=backend, **WEIGHTS)
    incoming = (torch._neg_view(grad_quantized), torch._neg_view(torch.tensor(1.0)))
    grad_z, grad_codebook = torch.autograd.grad((output.quantized, output.loss), (z, codebook), incoming)
    assert_within(grad_z, expected.grad_z, expected.grad_z_bound)
    assert_within(grad_codebook, expected.grad_codebook, expected.grad_codebook_bound)


@dtypes
@pytest.mark.parametrize("codebook_dtype", VALUE_DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_a_codebook_of_another_dtype(backend: str, dtype: torch.dtype, codebook_dtype: torch.dtype) -> None:
    z, codebook, grad_quantized = problem((60, 3), dtype)
    codebook = codebook.to(codebook_dtype)
    indices = nearest(z, codebook)
    expected = gradients(z, codebook, grad_quantized, 1.0, **WEIGHTS)
    z.requires_grad_()
    codebook.requires_grad_()
    output = latent_quantize(z, codebook, backend=backend, **WEIGHTS)
    assert_same_bits(output.indices, indices.to(torch.int32))
    assert_same_bits(output.quantized, quantized_at(indices, z, codebook))
    assert output.loss.dtype is compute_dtype(dtype)
    torch.autograd.backward((output.quantized, output.loss), (grad_quantized, torch.ones_like(output.loss)))
    assert codebook.grad.dtype is codebook_dtype
    assert_within(z.grad, expected.grad_z, expected.grad_z_bound)
    assert_within(codebook.grad, expected.grad_codebook, expected.grad_codebook_bound)


def test_a_codebook_of_any_layout(backend: str) -> None:
    z, codebook, _ = problem((60, 3), torch.float32)
    want = latent_quantize(z, codebook, backend=backend)
    wide = torch.randn(3, 21)
    wide[:, 1::2] = codebook
    for codes in (codebook.T.contiguous().T, wide[:, 1::2]):
        assert not codes.is_contiguous()
        codes = codes.detach().requires_grad_()
        output = latent_quantize(z, codes, backend=backend)
        output.loss.backward()
        for got, expected in zip(output, want, strict=True):
            assert_same_bits(got, expected)
        assert codes.grad.shape == codes.shape
    row = torch.tensor(even(10)).expand(3, 10)
    assert_same_bits(
        latent_quantize(z, row, backend=backend).indices, latent_quantize(z, row[:1], backend=backend).indices
    )


@pytest.mark.parametrize("index_dtype", INDEX_DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("samples", [5, 600])
def test_index_dtypes(backend: str, index_dtype: torch.dtype, samples: int) -> None:
    # All 256 codes fit into uint8, and z meets the largest of them.
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        codebook = torch.linspace(-1, 1, 256).repeat(3, 1)
        z = torch.linspace(-1.1, 1.1, 3 * samples).view(samples, 3).to(dtype)
        for latents in (z, z.T.contiguous().T):
            indices = latent_quantize(latents, codebook, index_dtype=index_dtype, backend=backend).indices
            assert_same_bits(indices, nearest(z, codebook).to(index_dtype))
            assert indices.max() == 255


def test_indices_may_be_left_out(backend: str) -> None:
    z, codebook, _ = problem((60, 3), torch.float32)
    z.requires_grad_()
    with_indices = latent_quantize(z, codebook, backend=backend)
    output = latent_quantize(z, codebook, return_indices=False, backend=backend)
    assert output.indices is None
    assert torch.equal(output.quantized, with_indices.quantized)
    assert torch.equal(output.loss, with_indices.loss)
    assert torch.equal(*(torch.autograd.grad(result.loss, z)[0] for result in (output, with_indices)))


def test_the_output_is_a_named_tuple_of_three(backend: str) -> None:
    output = latent_quantize(torch.zeros(2, 3), torch.zeros(3, 4), backend=backend)
    quantized, indices, loss = output
    assert isinstance(output, LatentQuantizerOutput)
    assert (output.quantized, output.indices, output.loss) == (quantized, indices, loss)


@dtypes
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 3, 4), (2, 3, 0), (2, 0, 4), (0, 0), (0,), (5, 0, 3)])
def test_empty_latents(backend: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    channel_dim = min(1, len(shape) - 1)
    z = torch.empty(shape, dtype=dtype, requires_grad=True)
    codebook = torch.zeros(shape[channel_dim], 10, dtype=compute_dtype(dtype), requires_grad=True)
    output = latent_quantize(z, codebook, channel_dim=channel_dim, backend=backend)
    assert output.quantized.shape == output.indices.shape == z.shape
    assert output.quantized.dtype is dtype
    assert_same_bits(output.loss, torch.zeros((), dtype=compute_dtype(dtype)))
    (output.quantized.sum() + output.loss).backward()
    assert z.grad.shape == z.shape
    assert (codebook.grad == 0).all()


def test_a_single_dimension_is_the_latents(backend: str) -> None:
    z, codebook, _ = problem((7,), torch.float32, channel_dim=0)
    for channel_dim in (0, -1):
        output = latent_quantize(z, codebook, channel_dim=channel_dim, backend=backend)
        assert_same_bits(output.indices, nearest(z, codebook, channel_dim=0).to(torch.int32))


def test_inference_mode_and_no_grad(backend: str) -> None:
    z, codebook, _ = problem((40, 3), torch.float32)
    want = latent_quantize(z, codebook.requires_grad_(), backend=backend)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            got = latent_quantize(z, codebook, backend=backend)
        assert not got.loss.requires_grad
        for one, other in zip(got, want, strict=True):
            assert torch.equal(one, other)


def test_autocast_leaves_the_arithmetic_alone(backend: str) -> None:
    z, codebook, _ = problem((40, 3), torch.bfloat16)
    codebook.requires_grad_()
    want = latent_quantize(z, codebook, backend=backend)
    device = device_of(backend)
    with torch.autocast(device.type, torch.bfloat16):
        got = latent_quantize(z, codebook, backend=backend)
        latents = torch.nn.functional.linear(torch.ones(4, 3, device=device), torch.eye(3, device=device))
        assert latent_quantize(latents, codebook, backend=backend).quantized.dtype is torch.bfloat16
    for one, other in zip(got, want, strict=True):
        assert_same_bits(one, other)


POOL = [0.0, -0.0, 1.0, -1.0, 0.5, 2.0, 100.0, 1e8, -3e38, 3e38, 1e-45, -1e-40, 1.1754944e-38, 1.0 + 2.0**-23]
values = st.one_of(st.sampled_from([*POOL, math.inf, -math.inf, math.nan]), st.floats(-2, 2, width=32))


@st.composite
def calls(draw: st.DrawFn, code: st.SearchStrategy[float] = values, hostile: bool = True) -> dict[str, object]:
    """Arguments of a call, with z in any layout."""
    shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    channel_dim = draw(st.integers(-len(shape), len(shape) - 1))
    if draw(st.integers(0, 3)) == 0:
        # Enough samples per latent for the searches that prepare tables.
        other = draw(st.sampled_from([dim for dim in range(len(shape)) if dim != channel_dim % len(shape)] or [0]))
        shape[other] = draw(st.integers(90, 700))
    num_latents = shape[channel_dim]
    dtype = draw(st.sampled_from(VALUE_DTYPES))
    rows = draw(st.sampled_from([1, num_latents]))
    columns = draw(st.sampled_from([1, 2, 3, 5, 10, 17, 70]))
    levels = draw(st.none() | st.lists(st.integers(1, columns), min_size=rows, max_size=rows))
    few = draw(st.lists(code, min_size=1, max_size=12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    places = torch.randint(len(few), (rows, columns), generator=generator)
    scatter = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    scatter *= draw(st.sampled_from([0.0, 1e-7, 1.0]))
    codebook = (torch.tensor(few, dtype=torch.float64)[places] + scatter).to(draw(st.sampled_from(VALUE_DTYPES)))
    candidates = torch.cat((codebook.double().flatten(), torch.tensor(few, dtype=torch.float64)))
    if hostile:
        candidates = torch.cat((candidates, torch.tensor([math.nan, math.inf, -math.inf, 4e4, 40.0])))
    first, second = candidates[torch.randint(len(candidates), (2, *shape), generator=generator)]
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    kind = torch.randint(4, shape, generator=generator)
    z = torch.where(kind == 0, first, torch.where(kind == 1, first / 2 + second / 2, first + noise)).to(dtype)
    return {
        "z": draw(laid_out(z)),
        "codebook": codebook,
        "levels": levels,
        "channel_dim": channel_dim,
        "index_dtype": draw(st.sampled_from(INDEX_DTYPES)),
    }


@st.composite
def laid_out(draw: st.DrawFn, z: Tensor) -> Tensor:
    """The values of z in another layout; where a dimension is expanded, its first slice everywhere."""
    order = draw(st.permutations(range(z.dim())))
    back = [order.index(dim) for dim in range(z.dim())]
    z = z.permute(order).contiguous().permute(back)
    kind = draw(st.sampled_from(["dense", "gaps", "expanded", "offset", "contiguous"]))
    dim = draw(st.integers(0, z.dim() - 1))
    if kind == "gaps":
        wide = torch.full([size * (2 if d == dim else 1) for d, size in enumerate(z.shape)], -7.0, dtype=z.dtype)
        step = (slice(None),) * dim + (slice(1, None, 2),)
        wide[step] = z
        return wide[step]
    if kind == "expanded":
        return z.narrow(dim, 0, 1).expand(z.shape)
    if kind == "offset":
        # One element off the alignment of the allocator.
        memory = torch.full((z.numel() + 1,), -7.0, dtype=z.dtype)
        return memory[1:].view(z.shape).copy_(z)
    return z.contiguous() if kind == "contiguous" else z


@settings(examples, max_examples=150)
@given(call=calls())
def test_indices_and_codes_of_any_call(backend: str, call: dict[str, object]) -> None:
    z, codebook, levels, channel_dim = (call[name] for name in ("z", "codebook", "levels", "channel_dim"))
    before = z.clone()
    indices = nearest(z, codebook, levels=levels, channel_dim=channel_dim)
    output = latent_quantize(backend=backend, **call)
    assert_same_bits(output.indices, indices.to(call["index_dtype"]))
    assert_same_bits(output.quantized, quantized_at(indices, z, codebook, channel_dim))
    assert output.quantized.stride() == output.indices.stride() == torch.empty_like(z).stride()
    assert_same_bits(z, before)


@settings(examples, max_examples=80)
@given(call=calls(code=st.floats(-2, 2, width=32), hostile=False), layout=st.data())
def test_gradients_of_any_call(backend: str, call: dict[str, object], layout: st.DataObject) -> None:
    z, codebook, levels, channel_dim = (call[name] for name in ("z", "codebook", "levels", "channel_dim"))
    generator = torch.Generator().manual_seed(0)
    grad_quantized = layout.draw(laid_out(torch.randn(z.shape, generator=generator).to(z.dtype)))
    expected = gradients(z, codebook, grad_quantized, 3.0, levels=levels, channel_dim=channel_dim, **WEIGHTS)
    latents, codes = z.detach().requires_grad_(), codebook.detach().requires_grad_()
    output = latent_quantize(**(call | WEIGHTS | {"z": latents, "codebook": codes}), backend=backend)
    incoming = (grad_quantized, torch.full_like(output.loss, 3.0))
    grad_z, grad_codebook = torch.autograd.grad((output.quantized, output.loss), (latents, codes), incoming)
    assert_within(output.loss, expected.loss, expected.loss_bound)
    assert_within(grad_z, expected.grad_z, expected.grad_z_bound)
    assert_within(grad_codebook, expected.grad_codebook, expected.grad_codebook_bound)


Z, CODEBOOK = torch.zeros(5, 3), torch.zeros(3, 10)


ERRORS = [
    ({"z": [[1.0, 2.0, 3.0]]}, TypeError, ["z", "list"]),
    ({"codebook": "codes"}, TypeError, ["codebook", "str"]),
    ({"z": Z.int()}, TypeError, ["z", "int32", "float32, float64, float16 or bfloat16"]),
    ({"z": Z.to(torch.complex64)}, TypeError, ["z", "complex64"]),
    ({"codebook": CODEBOOK.long()}, TypeError, ["codebook", "int64", "float32"]),
    ({"z": Z.to_sparse()}, (TypeError, ValueError), ["z", "sparse"]),
    ({"codebook": CODEBOOK.to_sparse()}, (TypeError, ValueError), ["codebook", "sparse"]),
    ({"channel_dim": 2}, ValueError, ["channel_dim", "2", "(5, 3)"]),
    ({"channel_dim": -3}, ValueError, ["channel_dim", "-3", "(5, 3)"]),
    ({"z": torch.tensor(1.0)}, ValueError, ["channel_dim", "()"]),
    ({"z": torch.zeros(3, 5).T, "channel_dim": 2}, ValueError, ["channel_dim", "2", "(5, 3)"]),
    ({"codebook": torch.zeros(4, 10)}, ValueError, ["codebook", "[3, K]", "[1, K]", "(4, 10)"]),
    ({"codebook": torch.zeros(10)}, ValueError, ["codebook", "[3, K]", "(10,)"]),
    ({"codebook": torch.zeros(3, 0)}, ValueError, ["codebook", "K >= 1", "(3, 0)"]),
    ({"codebook": torch.zeros(3, 10, 1)}, ValueError, ["codebook", "[3, K]", "(3, 10, 1)"]),
    ({"codebook": CODEBOOK.to("meta")}, ValueError, ["device", "{device}", "meta"]),
    ({"levels": (10, 10)}, ValueError, ["levels", "3", "(10, 10)"]),
    ({"levels": (0, 5, 5)}, ValueError, ["levels", "1..10", "(0, 5, 5)"]),
    ({"levels": (5, 5, 11)}, ValueError, ["levels", "1..10", "(5, 5, 11)"]),
    ({"levels": 10}, (TypeError, ValueError), ["levels", "10"]),
    ({"levels": (2.5, 5, 5)}, (TypeError, ValueError), ["levels", "2.5"]),
    ({"levels": "555"}, TypeError, ["levels", "'555'"]),
    *(
        ({name: weight}, error, [word, str(weight)])
        for name in ("quantization_weight", "commitment_weight")
        for weight, error, word in (
            (math.nan, ValueError, name),
            (math.inf, ValueError, name),
            (-1, ValueError, name),
            (-0.5, ValueError, name),
            ("0.1", TypeError, "weights"),
            (None, TypeError, "weights"),
        )
    ),
    ({"index_dtype": torch.float32}, TypeError, ["index_dtype", "uint8, int16, int32 or int64", "float32"]),
    ({"index_dtype": "int32"}, TypeError, ["index_dtype", "int32"]),
    ({"codebook": torch.zeros(3, 257), "index_dtype": torch.uint8}, ValueError, ["uint8", "255", "257"]),
    ({"codebook": torch.zeros(3, 32769), "index_dtype": torch.int16}, ValueError, ["int16", "32767", "32769"]),
    ({"backend": "numpy"}, ValueError, ["backend", "auto", "cpu", "reference", "triton", "cuda", "'numpy'"]),
    *(
        ({"backend": name}, RuntimeError, [name, "not available", reason])
        for name in ("cuda", "triton")
        if (reason := unavailable_reason(name)) is not None
    ),
]


@each_backend
@pytest.mark.parametrize(
    ("arguments", "error", "named"), ERRORS, ids=[f"{'-'.join(row[0])}-{number}" for number, row in enumerate(ERRORS)]
)
def test_errors_name_what_was_given_and_what_is_wanted(
    backend: str, arguments: dict[str, object], error: type[Exception], named: list[str]
) -> None:
    with pytest.raises(error) as caught:
        latent_quantize(**({"z": Z, "codebook": CODEBOOK, "backend": backend} | arguments))
    for word in named:
        assert word.replace("{device}", str(device_of(backend))) in str(caught.value)


def test_an_index_dtype_that_just_fits(backend: str) -> None:
    latent_quantize(torch.zeros(2, 1), torch.zeros(1, 256), index_dtype=torch.uint8, backend=backend)
    latent_quantize(torch.zeros(2, 1), torch.zeros(1, 32768), index_dtype=torch.int16, backend=backend)


LEVELS = [7, 2, 5]


@pytest.mark.parametrize(
    "levels",
    [tuple(LEVELS), np.array(LEVELS), torch.tensor(LEVELS), [np.int64(count) for count in LEVELS]],
    ids=["tuple", "array", "tensor", "numbers of NumPy"],
)
def test_levels_may_be_whole_numbers_of_any_kind(backend: str, levels: object) -> None:
    z, codebook, _ = problem((40, 3), torch.float32)
    indices = latent_quantize(z, codebook, levels=levels, backend=backend).indices
    assert_same_bits(indices, nearest(z, codebook, levels=LEVELS).to(torch.int32))


def test_the_same_arguments_in_another_order_of_types(backend: str) -> None:
    # Calls are kept by their arguments; those of another dtype or shape must not meet.
    for dtype in VALUE_DTYPES:
        for shape in ((4, 3), (3, 4), (4, 3, 1)):
            z, codebook, _ = problem(shape, dtype)
            for levels in (None, [10] * shape[1], [2] * shape[1]):
                output = latent_quantize(z, codebook, levels=levels, backend=backend)
                assert_same_bits(output.indices, nearest(z, codebook, levels=levels).to(torch.int32))


MEMORY = """
import resource, sys, torch
from qlae_kernels import latent_quantize

backend, device = sys.argv[1:]

def peak():
    if device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return torch.cuda.max_memory_allocated() / 2**20

def extra(shape, levels):
    z = torch.randn(shape, device=device, requires_grad=True)
    codebook = torch.randn(shape[1], levels, device=device, requires_grad=True)
    before = peak()
    latent_quantize(z, codebook, backend=backend).loss.backward()
    return peak() - before

z = torch.zeros(2, 3, device=device, requires_grad=True)
latent_quantize(z, torch.zeros(3, 4, device=device), backend=backend).loss.backward()
print(extra((1, 256, 63), 8192), extra((2, 64, 50), 16384), extra((50_000, 12), 1000))
"""


@pytest.mark.parametrize("name", available_backends())
def test_nothing_of_the_size_of_all_distances_is_allocated(name: str) -> None:
    command = [sys.executable, "-P", "-c", MEMORY, name, str(device_of(name))]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    one_sample, two_samples, many_samples = map(float, run.stdout.split())
    # MiB on top of z and codebook (8, 4 and 2 MiB); all distances would take 504, 400 and 2289 MiB.
    assert one_sample < 200
    assert two_samples < 100
    assert many_samples < 500


def test_a_weight_that_is_a_tensor_is_read_anew_in_each_call(backend: str) -> None:
    z, codebook, _ = problem((40, 3), torch.float32)
    weight = torch.tensor(1.0)
    first = latent_quantize(z, codebook, backend=backend, quantization_weight=0.0, commitment_weight=weight).loss
    weight.fill_(3.0)
    second = latent_quantize(z, codebook, backend=backend, quantization_weight=0.0, commitment_weight=weight).loss
    torch.testing.assert_close(second, 3 * first)
