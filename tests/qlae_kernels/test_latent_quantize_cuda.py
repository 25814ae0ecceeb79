"""The CUDA kernels without a GPU: run by the emulation against the op's definition, and what nvcc makes of them."""

import math
import re
import shutil
import subprocess
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from emulated_cuda import SOURCES, checked_run, choosing, registered, value_type_flags
from latent_quantize_statement import (
    INDEX_DTYPES,
    VALUE_DTYPES,
    Gradients,
    assert_same_bits,
    assert_within,
    compute_dtype,
    gradients,
    nearest,
    quantized_at,
)

from qlae_kernels import latent_quantize

# Where nothing can be left unwritten unseen.
pytestmark = pytest.mark.usefixtures("poisoned_memory")

WEIGHTS = {"quantization_weight": 0.75, "commitment_weight": 0.25}
GRAD_LOSS = 3.0
# Search and bins; 0 is the launcher's own choice.
CHOICES = ((0, 0), (1, 1), (2, 1), (2, 2), (3, 0))
# Shape of z, channel_dim, K, and the codebook's rows where they are not one per latent.
PROBLEMS = (
    ((1, 1), 1, 3, None),
    ((128, 12), 1, 10, None),
    ((700, 12), 1, 10, None),
    ((3000, 16), 1, 10, None),
    ((700, 5), 1, 100, None),
    ((600, 130), 1, 4, None),
    ((4, 3, 19, 13), 1, 10, None),
    ((3, 2, 4100), 1, 30, None),
    ((37, 6, 5), 1, 7, None),
    ((50, 7, 11), -1, 10, None),
    ((6, 500), 0, 10, None),
    ((7000,), 0, 10, 1),
    ((700, 5), 1, 100, 1),
    ((5, 7000), 1, 3, None),
    ((2, 3, 50, 60), 1, 16, None),
    ((33, 1001), 1, 17, None),
    ((300, 4), 1, 1000, None),
    ((200, 2), 1, 4096, None),
)

dtypes = pytest.mark.parametrize("dtype", VALUE_DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


@pytest.fixture(scope="module")
def backend(emulated_cuda_module):
    with registered(emulated_cuda_module) as name:
        yield name


@pytest.fixture(params=CHOICES, ids=lambda choice: f"search{choice[0]}-bins{choice[1]}")
def choices(emulated_cuda_module, backend, request: pytest.FixtureRequest):
    with choosing(emulated_cuda_module, *request.param):
        yield


def latents(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def codes(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    return latents((rows, columns), compute_dtype(dtype), seed=1)


def offset(tensor: torch.Tensor, elements: int) -> torch.Tensor:
    """A copy that begins this many elements into its memory, where no wide access is aligned."""
    memory = torch.empty(tensor.numel() + elements, dtype=tensor.dtype)
    return memory[elements:].view(tensor.shape).copy_(tensor)


def check_forward(z: torch.Tensor, codebook: torch.Tensor, backend: str, **options) -> None:
    output = latent_quantize(z, codebook, backend=backend, **WEIGHTS, **options)
    index_dtype = options.pop("index_dtype", torch.int32)
    indices = nearest(z, codebook, **options)
    assert_same_bits(output.indices, indices.to(index_dtype))
    assert_same_bits(output.quantized, quantized_at(indices, z, codebook, options.get("channel_dim", 1)))
    without = latent_quantize(z, codebook, backend=backend, return_indices=False, **WEIGHTS, **options)
    assert without.indices is None
    assert_same_bits(without.quantized, output.quantized)


def results(z: torch.Tensor, codebook: torch.Tensor, grad_quantized: torch.Tensor | None, backend: str, **options):
    """quantized, indices, loss and both gradients."""
    z, codebook = z.detach().requires_grad_(), codebook.detach().requires_grad_()
    output = latent_quantize(z, codebook, backend=backend, **WEIGHTS, **options)
    grad_loss = torch.tensor(GRAD_LOSS, dtype=output.loss.dtype)
    if grad_quantized is None:
        output.loss.backward(grad_loss)
    else:
        torch.autograd.backward((output.quantized, output.loss), (grad_quantized, grad_loss))
    return output.quantized, output.indices, output.loss, z.grad, codebook.grad


class Case(NamedTuple):
    """Inputs, and what the definition makes of them."""

    z: torch.Tensor
    codebook: torch.Tensor
    grad_quantized: torch.Tensor | None
    options: dict
    indices: torch.Tensor
    quantized: torch.Tensor
    gradients: Gradients


def case_of(z: torch.Tensor, codebook: torch.Tensor, *, with_grad: bool = True, **options) -> Case:
    """For finite z."""
    grad_quantized = latents(z.shape, z.dtype, seed=2) if with_grad else None
    indices = nearest(z, codebook, **options)
    quantized = quantized_at(indices, z, codebook, options.get("channel_dim", 1))
    want = gradients(z, codebook, grad_quantized, GRAD_LOSS, **WEIGHTS, **options)
    return Case(z, codebook, grad_quantized, options, indices.to(torch.int32), quantized, want)


def check_case(case: Case, backend: str) -> None:
    """Forward and backward against the definition."""
    quantized, indices, loss, grad_z, grad_codebook = results(
        case.z, case.codebook, case.grad_quantized, backend, **case.options
    )
    want = case.gradients
    assert_same_bits(indices, case.indices)
    assert_same_bits(quantized, case.quantized)
    assert_within(loss, want.loss, want.loss_bound)
    assert_within(grad_z, want.grad_z, want.grad_z_bound)
    assert_within(grad_codebook, want.grad_codebook, want.grad_codebook_bound)


def check(z: torch.Tensor, codebook: torch.Tensor, backend: str, **options) -> None:
    check_case(case_of(z, codebook, **options), backend)


@cache
def case_of_problem(problem: tuple, dtype: torch.dtype) -> Case:
    """Made once for all choices: with thousands of latents the definition takes longer than the kernels."""
    shape, channel_dim, columns, rows = problem
    codebook = codes(rows or shape[channel_dim], columns, dtype)
    return case_of(latents(shape, dtype), codebook, channel_dim=channel_dim)


@dtypes
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_forward_and_backward_are_the_definition(choices, backend, problem, dtype):
    check_case(case_of_problem(problem, dtype), backend)


@dtypes
@pytest.mark.parametrize("elements", [1, 2, 3])
def test_memory_that_is_not_aligned(choices, backend, elements, dtype):
    z, codebook = offset(latents((301, 12), dtype), elements), offset(codes(12, 10, dtype), 1)
    check(z, codebook, backend)


@dtypes
def test_ragged_levels(choices, backend, dtype):
    z, codebook = latents((400, 6), dtype), codes(6, 40, dtype)
    check(z, codebook, backend, levels=(1, 2, 40, 7, 39, 16))
    check(z.view(20, 20, 6), codebook, backend, levels=(3, 1, 1, 5, 2, 4), channel_dim=-1)
    check(z, codebook[:1], backend, levels=(5,))


@dtypes
def test_loss_alone(choices, backend, dtype):
    check(latents((300, 7), dtype), codes(7, 10, dtype), backend, with_grad=False)


@dtypes
def test_latents_that_are_not_finite(choices, backend, dtype):
    z = latents((300, 7), dtype)
    z[::5, 0], z[3, 1], z[7, 6] = math.nan, math.inf, -math.inf
    check_forward(z, codes(7, 10, dtype), backend)
    assert not latent_quantize(z, codes(7, 10, dtype), backend=backend).loss.isfinite()


@dtypes
@pytest.mark.parametrize("columns", [6, 40, 300])
def test_duplicates(choices, backend, columns, dtype):
    codebook = codes(4, columns, dtype)
    codebook[:, columns // 2 :] = codebook[:, : columns - columns // 2]
    z = torch.cat((latents((200, 4), dtype), codebook.T.to(dtype)))
    check(z, codebook, backend)


@dtypes
@pytest.mark.parametrize("columns", [6, 40, 300])
def test_codes_that_are_not_finite(choices, backend, columns, dtype):
    codebook = codes(4, columns, dtype)
    codebook[0, columns // 2], codebook[1, 0], codebook[2, 1], codebook[2, 2] = math.nan, math.nan, math.inf, -math.inf
    check_forward(latents((300, 4), dtype), codebook, backend)


@pytest.mark.parametrize("index_dtype", INDEX_DTYPES, ids=str)
def test_index_dtypes(choices, backend, index_dtype):
    check_forward(
        offset(latents((301, 12), torch.float32), 1), codes(12, 100, torch.float32), backend, index_dtype=index_dtype
    )


@dtypes
@pytest.mark.parametrize("shape", [(0, 4), (3, 4, 0)])
def test_empty(choices, backend, shape, dtype):
    z, codebook = latents(shape, dtype), codes(4, 5, dtype)
    quantized, indices, loss, grad_z, grad_codebook = results(z, codebook, z, backend)
    assert quantized.shape == indices.shape == grad_z.shape == shape
    assert loss == 0
    assert_same_bits(grad_codebook, torch.zeros_like(codebook))


@dtypes
@pytest.mark.parametrize("shape", [(3000, 16), (3, 2, 4100)])
def test_two_runs_agree_bit_for_bit(choices, backend, shape, dtype):
    z, codebook, grad = latents(shape, dtype), codes(shape[1], 10, dtype), latents(shape, dtype, seed=2)
    first, second = (results(z, codebook, grad, backend) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert_same_bits(one, other)


@pytest.fixture(scope="module")
def cubin(tmp_path_factory: pytest.TempPathFactory):
    """The float32 kernels for the H100, and what ptxas says of them."""
    # Where the build looks for it too.
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        pytest.skip("needs nvcc of the CUDA toolkit, on PATH or in /usr/local/cuda")
    target = tmp_path_factory.mktemp("cubin") / "float32.cubin"
    flags = ("-std=c++20", "-O3", "-arch=sm_90", "-Xptxas", "-v", "-cubin", *value_type_flags("Float32"))
    ended = checked_run([nvcc, *flags, f"-I{SOURCES}", "-o", target, SOURCES / "latent_quantize_cuda_kernels.cu"])
    return target, ended.stdout + ended.stderr


def test_kernels_spill_nothing_and_need_no_stack(cubin):
    _, report = cubin
    functions = re.findall(r"Compiling entry function '(\w+)'", report)
    memory = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert any("forward" in name for name in functions)
    assert any("backward" in name for name in functions)
    # One line per kernel at least; a function that was not inlined would add one, and is held to the same.
    assert len(memory) >= len(functions)
    assert set(memory) == {("0", "0", "0")}, report


def test_kernels_access_memory_in_16_bytes(cubin):
    triton = find_spec("triton")
    tool = triton and Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if tool is None or not tool.is_file():
        pytest.skip("needs cuobjdump, which triton brings along")
    dumped = subprocess.run([tool, "-sass", cubin[0]], capture_output=True, text=True, check=True).stdout
    # Modifiers such as .CONSTANT may stand around the width.
    assert re.search(r"\bLDG\.E(\.\w+)*\.128\b", dumped)
    assert re.search(r"\bSTG\.E(\.\w+)*\.128\b", dumped)
    assert not re.search(r"\b(LDL|STL)\b", dumped)
