"""The ops as torch.library sees them, and calls that are traced: compiled, exported, with fake tensors."""

import pytest
import torch
from latent_quantize_statement import assert_same_bits, assert_within, gradients
from on_device import call_on, device_of, latent_quantize, on_backend
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

import qlae_kernels
from qlae_kernels import FusedLatentQuantizer, available_backends
from qlae_kernels.latent_quantize_ops import latent_quantize_backward_op, latent_quantize_op

WEIGHTS = {"quantization_weight": 0.75, "commitment_weight": 0.25}
WEIGHT_VALUES = tuple(WEIGHTS.values())
backends = pytest.mark.parametrize("name", available_backends())


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch.compiler.reset()


def problem(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, levels: int = 10) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    compute = torch.float64 if dtype is torch.float64 else torch.float32
    z = torch.randn(shape, generator=generator).to(dtype).requires_grad_()
    return z, torch.randn(shape[1], levels, generator=generator).to(compute).requires_grad_()


def layouts(dtype: torch.dtype) -> list[Tensor]:
    z, _ = problem((4, 3, 2, 5), dtype)
    z = z.detach()
    expanded = z[:, :, :, :1].expand(4, 3, 2, 5)
    return [z, z.to(memory_format=torch.channels_last), z.permute(2, 1, 0, 3), z[..., ::2], expanded]


@backends
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16], ids=["float32", "float64", "bfloat16"]
)
def test_opcheck_of_the_forward_op(name: str, dtype: torch.dtype) -> None:
    codebook = on_backend(problem((4, 3), dtype)[1], name)
    for z in layouts(dtype):
        arguments = (on_backend(z, name).requires_grad_(), codebook, None, 1, *WEIGHT_VALUES, torch.int32, True, name)
        torch.library.opcheck(latent_quantize_op, arguments, test_utils=("test_schema", "test_faketensor"))
    # No indices, ragged levels, a negative channel_dim, a codebook of another dtype.
    z, codebook = (on_backend(tensor, name) for tensor in problem((5, 3), dtype))
    arguments = (z, codebook.half(), [10, 2, 5], -1, *WEIGHT_VALUES, torch.uint8, False, name)
    torch.library.opcheck(latent_quantize_op, arguments)


@backends
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16], ids=["float32", "float64", "bfloat16"]
)
def test_opcheck_of_the_backward_op(name: str, dtype: torch.dtype) -> None:
    _, codebook = problem((4, 3), dtype)
    for z in layouts(dtype):
        for codes in (codebook.detach(), codebook.detach().half()):
            grad_loss = torch.ones((), dtype=torch.float64 if dtype is torch.float64 else torch.float32)
            tensors = (z, codes, torch.randn(z.shape).to(dtype), grad_loss)
            arguments = (*(on_backend(tensor, name) for tensor in tensors), None, 1, *WEIGHT_VALUES, name)
            torch.library.opcheck(latent_quantize_backward_op, arguments, test_utils=("test_schema", "test_faketensor"))


@backends
def test_the_op_has_the_values_and_gradients_of_the_function(name: str) -> None:
    z, codebook = problem((40, 3))
    output = latent_quantize(z, codebook, backend=name, **WEIGHTS)
    arguments = (z, codebook, None, 1, *WEIGHT_VALUES, torch.int32, True, name)
    results = call_on(device_of(name), latent_quantize_op, *arguments)
    for got, want in zip(results, output, strict=True):
        assert_same_bits(got, want)
    weight = torch.randn(40, 3)
    expected = gradients(z, codebook, weight, 1.0, **WEIGHTS)
    for quantized, loss in ((output.quantized, output.loss), (results[0], results[2])):
        grad_z, grad_codebook = torch.autograd.grad((quantized * weight).sum() + loss, (z, codebook))
        assert_within(grad_z, expected.grad_z, expected.grad_z_bound)
        assert_within(grad_codebook, expected.grad_codebook, expected.grad_codebook_bound)


@backends
@pytest.mark.parametrize(("use_quantized", "use_loss"), [(True, False), (False, True)])
def test_one_output_of_the_op_may_go_unused(name: str, use_quantized: bool, use_loss: bool) -> None:
    z, codebook = problem((40, 3))
    arguments = (z, codebook, None, 1, *WEIGHT_VALUES, torch.int32, True, name)
    quantized, _, loss = call_on(device_of(name), latent_quantize_op, *arguments)
    weight = torch.randn(40, 3)
    expected = gradients(z, codebook, weight if use_quantized else None, float(use_loss), **WEIGHTS)
    ((quantized * weight).sum() if use_quantized else loss).backward()
    assert_within(z.grad, expected.grad_z, expected.grad_z_bound)
    assert_within(codebook.grad, expected.grad_codebook, expected.grad_codebook_bound)


@backends
def test_fake_tensors_have_the_shapes_and_strides_of_real_ones(name: str) -> None:
    codebook = on_backend(problem((4, 3))[1], name)
    for z in (on_backend(layout, name) for layout in layouts(torch.float32)):
        want = qlae_kernels.latent_quantize(z, codebook, index_dtype=torch.int16, backend=name)
        mode = FakeTensorMode()
        fake_z, fake_codebook = (mode.from_tensor(tensor.detach()) for tensor in (z, codebook))
        with mode:
            got = qlae_kernels.latent_quantize(fake_z, fake_codebook, index_dtype=torch.int16, backend=name)
        for one, other in zip(got, want, strict=True):
            assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)
            assert one.device == other.device


class Autoencoder(nn.Module):
    """A quantizer between two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(8, 3)
        self.quantizer = FusedLatentQuantizer(3, [10, 4, 7], **WEIGHTS)
        self.decoder = nn.Linear(3, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        z = 3 * self.encoder(x)
        quantized, indices, loss = self.quantizer(z)
        return (self.decoder(quantized) - x).square().mean() + loss, indices, quantized, z


@torch._dynamo.config.patch(error_on_recompile=True)
def test_compiled_training_step_equals_the_eager_one() -> None:
    torch.manual_seed(0)
    model = Autoencoder()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for batch in (600, 701, 4000):
        x = torch.randn(batch, 8)
        results = []
        for run in (model, compiled):
            model.zero_grad()
            objective, indices, quantized, z = run(x)
            objective.backward()
            results.append((indices, quantized, objective, z, [p.grad.clone() for p in model.parameters()]))
        (eager, fused) = results
        # The layer before the quantizer may be rounded otherwise when compiled; here it is not.
        assert_same_bits(fused[3], eager[3])
        assert_same_bits(fused[0], eager[0])
        assert_same_bits(fused[1], eager[1])
        torch.testing.assert_close(fused[2], eager[2])
        for one, other in zip(fused[4], eager[4], strict=True):
            torch.testing.assert_close(one, other)


@backends
def test_compiled_without_indices_and_without_gradients(name: str) -> None:
    z, codebook = (on_backend(tensor, name) for tensor in problem((30, 3)))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss_of(z: Tensor, codebook: Tensor) -> Tensor:
        output = qlae_kernels.latent_quantize(z, codebook, return_indices=False, backend=name, **WEIGHTS)
        assert output.indices is None
        return output.loss

    with torch.no_grad():
        want = qlae_kernels.latent_quantize(z, codebook, backend=name, **WEIGHTS).loss
        assert_same_bits(loss_of(z, codebook), want)


def test_exported_module_gives_the_same_codes() -> None:
    quantizer = FusedLatentQuantizer(3, 5)
    z = torch.randn(6, 3)
    batch = torch.export.Dim("batch")
    exported = torch.export.export(quantizer, (z,), dynamic_shapes=({0: batch},))
    for latents in (z, torch.randn(50, 3)):
        for got, want in zip(exported.module()(latents), quantizer(latents), strict=True):
            assert_same_bits(got, want)
