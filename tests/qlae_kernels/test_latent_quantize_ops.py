"""The ops as torch.library sees them, and calls that are traced: compiled, exported, with fake tensors."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from backend_variants import EMULATED, ONCE, each_backend
from latent_quantize_statement import VALUE_DTYPES, assert_same_bits, assert_within, compute_dtype, gradients
from on_device import call_on, device_of, latent_quantize, on_backend
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch.compilers import nop
from torch._subclasses import FakeTensorMode

import qlae_kernels
from qlae.config import TrainConfig
from qlae.methods import build_method
from qlae_kernels import FusedLatentQuantizer
from qlae_kernels import backends as backends_module
from qlae_kernels.latent_quantize_ops import latent_quantize_backward_op, latent_quantize_op

WEIGHTS = {"quantization_weight": 0.75, "commitment_weight": 0.25}
WEIGHT_VALUES = tuple(WEIGHTS.values())


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Nothing compiled before, least of all what inductor keeps on disk of other versions of the ops."""
    torch.compiler.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        yield


def problem(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, levels: int = 10) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    compute = torch.float64 if dtype is torch.float64 else torch.float32
    z = torch.randn(shape, generator=generator).to(dtype).requires_grad_()
    return z, torch.randn(shape[1], levels, generator=generator).to(compute).requires_grad_()


def layouts(dtype: torch.dtype) -> dict[str, Tensor]:
    z, _ = problem((4, 3, 2, 5), dtype)
    z = z.detach()
    return {
        "contiguous": z,
        "channels last": z.to(memory_format=torch.channels_last),
        "permuted": z.permute(2, 1, 0, 3),
        "strided": z[..., ::2],
        "expanded": z[:, :, :, :1].expand(4, 3, 2, 5),
        "two dimensions": z.flatten(1)[:, :3],
    }


dtypes = pytest.mark.parametrize("dtype", VALUE_DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
# Every dtype in every layout where kernels run on the device that they are for, each dtype and each layout where they
# are emulated. The dtypes of `reference` come to the same dispatch.
opchecked = pytest.mark.parametrize(
    ("backend", "dtype", "layout"),
    [
        (backend, dtype, layout)
        for backend in ONCE
        for dtype in VALUE_DTYPES
        for layout in layouts(dtype)
        if backend in ("cpu", "cuda", "triton")
        or dtype is torch.float32
        or (backend == EMULATED and layout == "contiguous")
    ],
    ids=lambda value: str(value).removeprefix("torch."),
    indirect=["backend"],
)


@opchecked
def test_opcheck_of_the_forward_op(backend: str, dtype: torch.dtype, layout: str) -> None:
    z = on_backend(layouts(dtype)[layout], backend)
    codebook = on_backend(problem((4, 3), dtype)[1], backend)
    arguments = (z.requires_grad_(), codebook, None, 1, *WEIGHT_VALUES, torch.int32, True, backend)
    torch.library.opcheck(latent_quantize_op, arguments)


@each_backend
@dtypes
def test_opcheck_of_the_forward_op_with_other_arguments(backend: str, dtype: torch.dtype) -> None:
    # No indices, ragged levels, a negative channel_dim, a codebook of another dtype.
    z, codebook = (on_backend(tensor, backend) for tensor in problem((5, 3), dtype))
    arguments = (z, codebook.half(), [10, 2, 5], -1, *WEIGHT_VALUES, torch.uint8, False, backend)
    torch.library.opcheck(latent_quantize_op, arguments)


@opchecked
def test_opcheck_of_the_backward_op(backend: str, dtype: torch.dtype, layout: str) -> None:
    z, codebook = layouts(dtype)[layout], problem((4, 3), dtype)[1].detach()
    grad_loss = torch.ones((), dtype=compute_dtype(dtype))
    tensors = (z, codebook if layout != "strided" else codebook.half(), torch.randn(z.shape).to(dtype), grad_loss)
    placed = (on_backend(tensor, backend).requires_grad_() for tensor in tensors)
    options = (None, 1, *WEIGHT_VALUES, torch.int32, True, backend)
    torch.library.opcheck(latent_quantize_backward_op, (*placed, True, True, *options))


@each_backend
def test_gradgradcheck_of_the_op(backend: str) -> None:
    codebook = torch.tensor([[-1.0, 0.0, 1.0, 3.0], [2.0, 0.5, -1.0, -2.0]], dtype=torch.float64)
    # Far from the midpoints between codes, where indices jump.
    z = torch.tensor([[0.2, 0.7], [-1.3, -0.8], [2.6, 1.9], [0.1, -2.4], [1.1, 0.4]], dtype=torch.float64)
    z, codebook = (on_backend(tensor.requires_grad_(), backend) for tensor in (z, codebook))

    def values_and_loss(z: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
        return latent_quantize_op(z, codebook, None, 1, *WEIGHT_VALUES, torch.int32, True, backend)[0::2]

    assert torch.autograd.gradgradcheck(values_and_loss, (z, codebook))


@each_backend
def test_the_op_has_the_values_and_gradients_of_the_function(backend: str) -> None:
    z, codebook = problem((40, 3))
    output = latent_quantize(z, codebook, backend=backend, **WEIGHTS)
    arguments = (z, codebook, None, 1, *WEIGHT_VALUES, torch.int32, True, backend)
    results = call_on(device_of(backend), latent_quantize_op, *arguments)
    for got, want in zip(results, output, strict=True):
        assert_same_bits(got, want)
    weight = torch.randn(40, 3)
    expected = gradients(z, codebook, weight, 1.0, **WEIGHTS)
    for quantized, loss in ((output.quantized, output.loss), (results[0], results[2])):
        grad_z, grad_codebook = torch.autograd.grad((quantized * weight).sum() + loss, (z, codebook))
        assert_within(grad_z, expected.grad_z, expected.grad_z_bound)
        assert_within(grad_codebook, expected.grad_codebook, expected.grad_codebook_bound)


@each_backend
@pytest.mark.parametrize(("use_quantized", "use_loss"), [(True, False), (False, True)])
def test_one_output_of_the_op_may_go_unused(backend: str, use_quantized: bool, use_loss: bool) -> None:
    z, codebook = problem((40, 3))
    arguments = (z, codebook, None, 1, *WEIGHT_VALUES, torch.int32, True, backend)
    quantized, _, loss = call_on(device_of(backend), latent_quantize_op, *arguments)
    weight = torch.randn(40, 3)
    expected = gradients(z, codebook, weight if use_quantized else None, float(use_loss), **WEIGHTS)
    ((quantized * weight).sum() if use_quantized else loss).backward()
    assert_within(z.grad, expected.grad_z, expected.grad_z_bound)
    if use_loss:
        assert_within(codebook.grad, expected.grad_codebook, expected.grad_codebook_bound)
    else:
        assert codebook.grad is None


@each_backend
@pytest.mark.parametrize("with_grad_quantized", [True, False])
@pytest.mark.parametrize(("need_z", "need_codebook"), [(True, False), (False, True)])
def test_the_backward_op_makes_what_is_needed(
    backend: str, need_z: bool, need_codebook: bool, with_grad_quantized: bool
) -> None:
    z, codebook = problem((40, 3))
    weight = torch.randn(40, 3) if with_grad_quantized else None
    expected = gradients(z, codebook, weight, 3.0, **WEIGHTS)
    tensors = (z, codebook, weight, torch.tensor(3.0))
    placed = [None if tensor is None else on_backend(tensor.detach(), backend) for tensor in tensors]
    options = (None, 1, *WEIGHT_VALUES, torch.int32, True, backend)
    grad_z, grad_codebook = latent_quantize_backward_op(*placed, need_z, need_codebook, *options)
    if need_z:
        assert_within(grad_z.cpu(), expected.grad_z, expected.grad_z_bound)
        assert grad_codebook.numel() == 0
    else:
        assert_within(grad_codebook.cpu(), expected.grad_codebook, expected.grad_codebook_bound)
        assert grad_z.numel() == 0
    torch.library.opcheck(latent_quantize_backward_op, (*placed, need_z, need_codebook, *options))


@pytest.mark.parametrize("frozen", ["codebook", "z"])
def test_a_compiled_call_asks_for_the_gradients_that_are_needed(frozen: str) -> None:
    z, codebook = problem((40, 3))
    (z if frozen == "z" else codebook).requires_grad_(False)
    graphs = []

    def remember(graph: torch.fx.GraphModule, example: list[Tensor]) -> object:
        graphs.append(graph)
        return nop(graph, example)

    backend = aot_autograd(fw_compiler=nop, bw_compiler=remember)
    compiled = torch.compile(lambda z, v: qlae_kernels.latent_quantize(z, v).loss, fullgraph=True, backend=backend)
    compiled(z, codebook).backward()
    (call,) = [node for node in graphs[0].graph.nodes if node.target is latent_quantize_backward_op]
    assert call.args[4:6] == (frozen != "z", frozen != "codebook")
    wanted, left_out = (codebook, z) if frozen == "z" else (z, codebook)
    assert left_out.grad is None
    (want,) = torch.autograd.grad(qlae_kernels.latent_quantize(z, codebook).loss, wanted)
    assert_same_bits(wanted.grad, want)


def test_a_latent_that_is_not_finite_has_the_straight_through_gradient_when_compiled() -> None:
    z, codebook = problem((40, 3))
    z.data[3, 1] = torch.nan
    z.data[5, 2] = torch.inf
    weight = torch.randn(40, 3)

    def objective(z: Tensor) -> Tensor:
        return (qlae_kernels.latent_quantize(z, codebook).quantized * weight).sum()

    for run in (objective, torch.compile(objective, fullgraph=True, backend="aot_eager")):
        assert_same_bits(torch.autograd.grad(run(z), z)[0], weight)


def test_compiled_autograd_takes_the_whole_backward_pass() -> None:
    z, codebook = problem((40, 3))
    want = torch.autograd.grad(qlae_kernels.latent_quantize(z, codebook, **WEIGHTS).loss, (z, codebook))
    loss = qlae_kernels.latent_quantize(z, codebook, **WEIGHTS).loss
    with torch._dynamo.compiled_autograd._enable(torch.compile(fullgraph=True, backend="aot_eager")):
        loss.backward()
    assert_same_bits(z.grad, want[0])
    assert_same_bits(codebook.grad, want[1])


WRONG = {
    "latents": ({"z": torch.zeros(4, 2)}, "codebook must have shape"),
    "dtype": ({"z": torch.zeros(4, 3, dtype=torch.int64)}, "z must be float32"),
    "levels": ({"levels": (5, 5, 11)}, "levels must be 3 numbers of 1..10"),
    "index dtype": ({"codebook": torch.zeros(3, 300), "index_dtype": torch.uint8}, "index_dtype uint8"),
    "weight": ({"commitment_weight": -1.0}, "commitment_weight must be"),
    "backend": ({"backend": "numpy"}, "backend must be one of"),
    "absent backend": ({"backend": "absent"}, "backend 'absent' is not available: not here"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_fake_tensors_are_checked_as_real_ones_are(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    absent = SimpleNamespace(unavailable_reason=lambda: "not here")
    monkeypatch.setitem(backends_module.BACKENDS, "absent", absent)
    monkeypatch.setattr(backends_module, "NAMES", (*backends_module.NAMES, "absent"))
    arguments, message = WRONG[wrong]
    arguments = {"z": torch.zeros(4, 3), "codebook": torch.zeros(3, 10)} | arguments
    for mode in (nullcontext(), FakeTensorMode(allow_non_fake_inputs=True)):
        with mode, pytest.raises((TypeError, ValueError, RuntimeError), match=message):
            qlae_kernels.latent_quantize(**arguments)


def test_a_jagged_nested_tensor_is_named() -> None:
    jagged = torch.nested.nested_tensor([torch.zeros(2, 3), torch.zeros(4, 3)], layout=torch.jagged)
    with pytest.raises(TypeError, match=r"z must be a dense tensor .* got layout torch\.jagged"):
        qlae_kernels.latent_quantize(jagged, torch.zeros(3, 5))


def test_jit_trace_records_the_op() -> None:
    quantizer = FusedLatentQuantizer(3, [5, 4, 3])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(quantizer, (torch.randn(4, 3),))
    z = torch.randn(9, 3)
    for got, want in zip(traced(z), quantizer(z), strict=True):
        assert_same_bits(got, want)
    (gradient,) = torch.autograd.grad(traced(z)[2], quantizer.codebook)
    assert_same_bits(gradient, torch.autograd.grad(quantizer(z).loss, quantizer.codebook)[0])


def test_a_weight_in_a_compiled_call_is_a_number() -> None:
    z, codebook = problem((40, 3))

    def loss_of(weight: float | Tensor) -> Tensor:
        return qlae_kernels.latent_quantize(z, codebook, commitment_weight=weight).loss

    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    # A graph is compiled for each value.
    for weight in (0.5, 2, 0.25):
        assert_same_bits(compiled(weight), loss_of(weight))
    with pytest.raises(torch._dynamo.exc.Unsupported, match="multiply `loss` by it"):
        compiled(torch.tensor(0.5))


@each_backend
def test_fake_tensors_have_the_shapes_and_strides_of_real_ones(backend: str) -> None:
    codebook = on_backend(problem((4, 3))[1], backend)
    for z in (on_backend(layout, backend) for layout in layouts(torch.float32).values()):
        want = qlae_kernels.latent_quantize(z, codebook, index_dtype=torch.int16, backend=backend)
        mode = FakeTensorMode()
        fake_z, fake_codebook = (mode.from_tensor(tensor.detach()) for tensor in (z, codebook))
        with mode:
            got = qlae_kernels.latent_quantize(fake_z, fake_codebook, index_dtype=torch.int16, backend=backend)
        for one, other in zip(got, want, strict=True):
            assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)
            assert one.device == other.device


class Autoencoder(nn.Module):
    """A quantizer between two linear layers."""

    def __init__(self, backend: str = "auto") -> None:
        super().__init__()
        self.encoder = nn.Linear(8, 3)
        self.quantizer = FusedLatentQuantizer(3, [10, 4, 7], backend=backend, **WEIGHTS)
        self.decoder = nn.Linear(3, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        z = 3 * self.encoder(x)
        quantized, indices, loss = self.quantizer(z)
        return (self.decoder(quantized) - x).square().mean() + loss, indices, quantized, z


def assert_steps_alike(compiled: Callable[[Tensor], tuple[Tensor, ...]], model: Autoencoder, batch: int) -> None:
    """A compiled training step equals the eager one."""
    x = torch.randn(batch, 8, device=model.encoder.weight.device)
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


@torch._dynamo.config.patch(error_on_recompile=True)
def test_compiled_training_step_equals_the_eager_one() -> None:
    torch.manual_seed(0)
    model = Autoencoder()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for batch in (600, 701, 4000):
        assert_steps_alike(compiled, model, batch)


@each_backend
def test_compiled_without_indices_and_without_gradients(backend: str) -> None:
    z, codebook = (on_backend(tensor, backend) for tensor in problem((30, 3)))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss_of(z: Tensor, codebook: Tensor) -> Tensor:
        output = qlae_kernels.latent_quantize(z, codebook, return_indices=False, backend=backend, **WEIGHTS)
        assert output.indices is None
        return output.loss

    with torch.no_grad():
        want = qlae_kernels.latent_quantize(z, codebook, backend=backend, **WEIGHTS).loss
        assert_same_bits(loss_of(z, codebook), want)


@each_backend
@torch._dynamo.config.patch(error_on_recompile=True)
def test_a_static_shape_compiles_once(backend: str) -> None:
    model = Autoencoder(backend).to(device_of(backend))
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    for _ in range(3):
        assert_steps_alike(compiled, model, 64)


@each_backend
def test_another_batch_size_compiles_once_more(backend: str) -> None:
    # PyTorch's own rule: the second size makes the batch dynamic, further ones compile nothing.
    counter = CompileCounterWithBackend("aot_eager")
    model = Autoencoder(backend).to(device_of(backend))
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for batch in (64, 65, 66, 200, 3):
        assert_steps_alike(compiled, model, batch)
    assert counter.frame_count == 2


def test_a_compiled_qlae_has_the_codes_of_the_eager_one() -> None:
    torch.manual_seed(0)
    method = build_method(TrainConfig(network="compact", num_latents=4), (3, 16, 16))
    images = torch.rand(8, 3, 16, 16)

    def features_and_results(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features = method.encoder(images)
        values, terms = method.latent(features)
        return features, method.latent.encode(features), method.decoder(values).mean() + terms["quantization"]

    compiled = torch.compile(features_and_results, fullgraph=True, backend="aot_eager")
    gradients = []
    for run in (features_and_results, compiled):
        method.zero_grad()
        features, codes, objective = run(images)
        # What comes before may be rounded otherwise when compiled; the codes are those of the features.
        assert_same_bits(codes, method.latent.encode(features))
        objective.backward()
        gradients.append([parameter.grad.clone() for parameter in method.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
