"""The README's table of features and backends: each cell is tried on the backends that are here."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from backend_variants import EMULATED, each_backend
from latent_quantize_statement import assert_same_bits
from on_device import device_of
from torch import Tensor, nn

from qlae_kernels import FusedLatentQuantizer, latent_quantize
from qlae_kernels.backends import BACKENDS
from qlae_kernels.problem import VALUE_DTYPES

README = Path(__file__).parents[2] / "README.md"
# Without those that tests add for a while.
COLUMNS = tuple(BACKENDS)


def table() -> dict[str, dict[str, str]]:
    """The cells of the table whose columns are the backends, by row and column, without links and code marks."""
    text = README.read_text()
    start = next(line for line in text.splitlines() if all(f"`{name}`" in line for name in COLUMNS))
    lines = text[text.index(start) :].split("\n\n")[0].splitlines()
    rows = [[cell.strip().replace("`", "") for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: dict(zip(rows[0][1:], row[1:], strict=True)) for row in rows[2:]}


def on(backend: str, shape: tuple[int, ...] = (6, 3), dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """z and a codebook [3, 5] for `backend`, both with gradients."""
    generator = torch.Generator().manual_seed(0)
    compute = torch.float64 if dtype is torch.float64 else torch.float32
    z = torch.randn(shape, generator=generator).to(device_of(backend), dtype)
    codebook = torch.randn(3, 5, generator=generator, dtype=compute).to(device_of(backend))
    return z.requires_grad_(), codebook.requires_grad_()


def trains(z: Tensor, codebook: Tensor, backend: str, **options: object) -> None:
    quantized, _, loss = latent_quantize(z, codebook, backend=backend, **options)
    grad_z, grad_codebook = torch.autograd.grad(quantized.float().sum() + loss, (z, codebook))
    assert grad_z.isfinite().all() and grad_codebook.any()


def dtypes(backend: str) -> None:
    for dtype in VALUE_DTYPES:
        trains(*on(backend, dtype=dtype), backend)


def layouts(backend: str) -> None:
    z, codebook = on(backend, (2, 3, 4, 5))
    for layout in (z, z.to(memory_format=torch.channels_last), z.permute(3, 1, 0, 2)):
        assert latent_quantize(layout, codebook, backend=backend).quantized.stride() == layout.stride()
        trains(layout.detach().requires_grad_(), codebook, backend)


def codebooks(backend: str) -> None:
    z, codebook = on(backend)
    trains(z, codebook, backend, levels=[2, 5, 1])
    trains(z, codebook[:1], backend)
    fixed = FusedLatentQuantizer(3, 5, learnable=False, backend=backend).to(z.device)
    assert not fixed(z).loss.isnan() and not list(fixed.parameters())


def indices(backend: str) -> None:
    z, codebook = on(backend, (4000, 3))
    got = latent_quantize(z, codebook, backend=backend).indices
    assert_same_bits(got.cpu(), (z.unsqueeze(-1) - codebook).abs().argmin(-1).int().cpu())


def repeated(backend: str) -> None:
    z, codebook = on(backend, (20000, 3))
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        output = latent_quantize(z, codebook, backend=backend)
        results.append((*output, *torch.autograd.grad(output.loss, (z, codebook))))
    for other in results[1:]:
        for position, (one, two) in enumerate(zip(results[0], other, strict=True)):
            # The reference's sums are PyTorch's, whose order depends on the threads.
            if backend != "reference" or position < 2:
                assert_same_bits(one.detach(), two.detach())


def masks(backend: str) -> None:
    z, codebook = on(backend)
    counts = torch.tensor([True, False] * 3, device=z.device)
    assert not latent_quantize(z, codebook, mask=counts, backend=backend).quantized[~counts].any()
    trains(z, codebook, backend, mask=counts)


def twice(backend: str) -> None:
    z, codebook = (tensor.detach().double().requires_grad_() for tensor in on(backend))
    output = latent_quantize(z, codebook, backend=backend)
    (grad_z,) = torch.autograd.grad(output.loss, z, create_graph=True)
    (grad_codebook,) = torch.autograd.grad(grad_z.square().sum(), codebook)
    assert grad_codebook.any()


def compiled(backend: str) -> None:
    quantizer = FusedLatentQuantizer(3, 5, backend=backend).to(device_of(backend))
    z, _ = on(backend)
    torch.compiler.reset()
    got = torch.compile(quantizer, fullgraph=True, backend="aot_eager")(z)
    for one, two in zip(got, quantizer(z), strict=True):
        assert_same_bits(one.detach(), two.detach())


def exported(backend: str) -> None:
    quantizer = FusedLatentQuantizer(3, 5, backend=backend).to(device_of(backend))
    z = on(backend)[0].detach()
    program = torch.export.export(quantizer, (z,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    longer = torch.cat([z, z])
    for one, two in zip(program.module()(longer), quantizer(longer), strict=True):
        assert_same_bits(one.detach(), two.detach())


def transformed(backend: str) -> None:
    z, codebook = (tensor.detach() for tensor in on(backend, (4, 6, 3)))

    def loss(z: Tensor) -> Tensor:
        return latent_quantize(z, codebook, backend=backend).loss

    got = torch.func.vmap(torch.func.grad(loss))(z)
    for one, sample in zip(got, z, strict=True):
        torch.testing.assert_close(one, torch.func.grad(loss)(sample))


def half_modules(backend: str) -> None:
    device = device_of(backend)
    model = nn.Sequential(nn.Linear(4, 3), FusedLatentQuantizer(3, 200, backend=backend)).to(device).bfloat16()
    output = model(torch.randn(50, 4, device=device, dtype=torch.bfloat16))
    quantizer = model[1]
    assert torch.equal(quantizer.unpack(quantizer.pack(output.indices)), output.indices)
    output.loss.backward()
    assert quantizer.codebook.grad.dtype is torch.bfloat16


PROBES: dict[str, Callable[[str], None]] = {
    "float32, float64, float16, bfloat16": dtypes,
    "any dense layout without a copy": layouts,
    "levels per latent, shared codebook, fixed values": codebooks,
    "same indices to the bit": indices,
    "same bits for any number of threads": repeated,
    "mask": masks,
    "autocast, half modules": half_modules,
    "gradient of the gradient": twice,
    "torch.compile(fullgraph=True)": compiled,
    "torch.export with a dynamic batch": exported,
    "torch.func.grad, vmap": transformed,
}
# Not to be tried: which devices a backend serves stands in its module.
RUNS_ON = "runs on"


def test_every_row_is_tried() -> None:
    assert set(table()) == {RUNS_ON, *PROBES}


def test_every_backend_has_its_column() -> None:
    for row in table().values():
        assert set(row) == set(COLUMNS)


@each_backend
@pytest.mark.parametrize("row", PROBES)
def test_a_cell_says_what_holds(row: str, backend: str) -> None:
    column = "cuda" if backend == EMULATED else backend
    assert not re.fullmatch("no.*", table()[row][column])
    PROBES[row](backend)
