"""Modules with the quantizer as exported programs (.pt2) and as ONNX models, with a batch of any size."""

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from backend_variants import ONCE
from latent_quantize_statement import assert_same_bits, codes_at, nearest
from on_device import device_of
from torch import Tensor, nn

from qlae.config import TrainConfig
from qlae.methods import Method, build_method
from qlae_kernels import FusedLatentQuantizer, LatentQuantizerOutput

BATCH = torch.export.Dim("batch")


class Entry(nn.Module):
    """One method of a module as its forward, which is what exporters take."""

    def __init__(self, module: nn.Module, method: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.module, self.method = module, method

    def forward(self, value: Tensor) -> Tensor:
        return self.method(self.module, value)


def entries(quantizer: FusedLatentQuantizer) -> dict[str, tuple[nn.Module, Tensor]]:
    """What is exported of a quantizer, with an example of its argument."""
    z = torch.randn(6, quantizer.num_latents, device=quantizer.codebook.device)
    indices = quantizer.encode(z)
    return {
        "forward": (quantizer, z),
        "encode": (Entry(quantizer, FusedLatentQuantizer.encode), z),
        "decode": (Entry(quantizer, FusedLatentQuantizer.decode), indices),
        "pack": (Entry(quantizer, FusedLatentQuantizer.pack), indices),
        "unpack": (Entry(quantizer, FusedLatentQuantizer.unpack), quantizer.pack(indices)),
    }


def model() -> Method:
    torch.manual_seed(0)
    return build_method(TrainConfig(network="compact", num_latents=4, levels=5), (3, 16, 16)).eval()


def model_entries() -> dict[str, tuple[nn.Module, Tensor]]:
    method, images = model(), torch.rand(2, 3, 16, 16)
    return {
        "encode": (Entry(method, lambda module, value: module.encode(value)), images),
        "decode": (Entry(method, lambda module, value: module.decode(value)), method.encode(images)),
        "reconstruct": (Entry(method, lambda module, value: module.reconstruct(value)), images),
    }


def assert_same_results(got: object, want: object) -> None:
    if isinstance(want, LatentQuantizerOutput):
        assert type(got) is LatentQuantizerOutput
    else:
        got, want = (got,), (want,)
    for one, other in zip(got, want, strict=True):
        assert_same_bits(one, other)


@pytest.mark.parametrize(("levels", "strict"), [(5, False), ([4, 1, 5], True)], ids=["traced", "strict-ragged"])
@pytest.mark.parametrize(
    ("backend", "name"),
    # What calls no backend is the same for all.
    [(backend, name) for backend in ONCE for name in ("forward", "encode")]
    + [("auto", name) for name in ("decode", "pack", "unpack")],
    indirect=["backend"],
)
def test_an_exported_program_is_saved_and_loaded(
    tmp_path: Path, backend: str, name: str, levels: int | list[int], strict: bool
) -> None:
    quantizer = FusedLatentQuantizer(3, levels, backend=backend, device=device_of(backend))
    module, example = entries(quantizer)[name]
    program = torch.export.export(module, (example,), dynamic_shapes=({0: BATCH},), strict=strict)
    torch.export.save(program, tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2").module()
    for value in (example, example.repeat(9, 1) if example.dim() == 2 else example.repeat(9)):
        assert_same_results(loaded(value), module(value))


@pytest.mark.parametrize("name", model_entries())
def test_a_model_is_exported(name: str) -> None:
    module, example = model_entries()[name]
    program = torch.export.export(module, (example,), dynamic_shapes=({0: BATCH},))
    for value in (example, example.repeat(3, *[1] * (example.dim() - 1))):
        torch.testing.assert_close(program.module()(value), module(value))


def test_what_a_call_refuses_is_not_exported() -> None:
    quantizer = FusedLatentQuantizer(3, 5)
    with pytest.raises(ValueError, match=r"4, 2"):
        torch.export.export(quantizer, (torch.zeros(4, 2),))
    with pytest.raises(TypeError, match="int64"):
        torch.export.export(quantizer, (torch.zeros(4, 3, dtype=torch.int64),))


LOAD = """
import sys, torch
{first}
path, z = sys.argv[1], torch.tensor([[0.1, -0.4]])
print(torch.export.load(path).module()(z).tolist())
"""


@pytest.mark.parametrize("imported", [True, False])
def test_loading_in_a_new_process_needs_the_package_imported(tmp_path: Path, imported: bool) -> None:
    module, example = entries(FusedLatentQuantizer(2, 3))["encode"]
    program = torch.export.export(module, (example,), dynamic_shapes=({0: BATCH},))
    torch.export.save(program, tmp_path / "program.pt2")
    script = LOAD.format(first="import qlae_kernels" if imported else "")
    command = [sys.executable, "-W", "ignore", "-c", script, str(tmp_path / "program.pt2")]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if imported:
        # Codes -0.5, 0, 0.5.
        assert run.stdout.strip() == "[[1, 0]]"
    else:
        assert run.returncode != 0
        assert "torch.ops.qlae.latent_quantize" in run.stderr


def onnx_session(module: nn.Module, example: Tensor, path: Path) -> Callable[[Tensor], list[Tensor]]:
    """A function that runs the module as exported to ONNX with PyTorch's own arguments."""
    torch.onnx.export(module.eval(), (example,), path, dynamo=True, dynamic_shapes=({0: BATCH},), verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (name,) = (argument.name for argument in session.get_inputs())
    return lambda value: [torch.from_numpy(np.asarray(result)) for result in session.run(None, {name: value.numpy()})]


def hostile_latents(codebook: Tensor) -> Tensor:
    """Codes, ties between two of them, values around both, and values that are not finite; [N, D]."""
    between = codebook[:, 1:] / 2 + codebook[:, :-1] / 2
    centres = torch.cat((codebook, between), 1)
    around = [centres, centres.nextafter(torch.tensor(9.0)), centres.nextafter(torch.tensor(-9.0))]
    far = torch.tensor([math.nan, math.inf, -math.inf, 3e38, -3e38, -0.0]).expand(codebook.size(0), -1)
    return torch.cat((*around, far), 1).T.contiguous()


@pytest.mark.parametrize(
    ("levels", "codes"), [((6, 6, 6), "distinct"), ((6, 4, 3), "duplicates"), ((6, 6, 6), "nan")], ids=str
)
def test_onnx_gives_the_same_indices_to_the_bit(tmp_path: Path, levels: tuple[int, ...], codes: str) -> None:
    quantizer = FusedLatentQuantizer(3, levels, index_dtype=torch.int64)
    with torch.no_grad():
        quantizer.codebook.copy_(torch.tensor([0.5, -0.25, 1.0, 0.0, -1.0, 0.125]).expand(3, -1))
        if codes == "duplicates":
            quantizer.codebook[:, 3] = 0.5
        if codes == "nan":
            quantizer.codebook[0, 2] = torch.nan
    run = onnx_session(quantizer, torch.zeros(2, 3), tmp_path / "quantizer.onnx")
    z = hostile_latents(torch.tensor([[-1.0, -0.25, 0.0, 0.125, 0.5, 1.0]]).repeat(3, 1))
    indices = nearest(z, quantizer.codebook, levels=levels)
    quantized, got, loss = run(z)
    assert_same_bits(got, indices)
    assert_same_bits(quantized, codes_at(indices, quantizer.codebook).masked_fill(~z.isfinite(), torch.nan))
    assert loss.isnan()
    if codes != "nan":
        finite = z[:-6]
        torch.testing.assert_close(run(finite)[2], quantizer(finite).loss.detach())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=["float64", "float16"])
def test_onnx_of_other_dtypes_and_layouts(tmp_path: Path, dtype: torch.dtype) -> None:
    quantizer = FusedLatentQuantizer(3, 7, index_dtype=torch.uint8)
    z = torch.randn(4, 3, 2, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    run = onnx_session(quantizer, z, tmp_path / "quantizer.onnx")
    want = quantizer(z)
    quantized, indices, loss = run(z)
    assert_same_bits(quantized, want.quantized)
    assert_same_bits(indices, want.indices)
    torch.testing.assert_close(loss, want.loss.detach())


def test_onnx_of_a_model(tmp_path: Path) -> None:
    method = model()
    images = torch.rand(5, 3, 16, 16)
    entries = model_entries()
    encode, decode = (onnx_session(*entries[name], tmp_path / f"{name}.onnx") for name in ("encode", "decode"))
    (codes,) = encode(images)
    assert_same_bits(codes, method.encode(images))
    (decoded,) = decode(codes)
    torch.testing.assert_close(decoded, method.decode(codes), rtol=1e-4, atol=1e-5)
