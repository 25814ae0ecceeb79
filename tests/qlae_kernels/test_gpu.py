"""What only a GPU can show: the CPU kernels' results at every size, launches, streams, graphs, compiled modules."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import on_device
import pytest
import torch
from latent_quantize_statement import VALUE_DTYPES, assert_same_bits, assert_within, compute_dtype
from torch import Tensor, nn
from torch.autograd import DeviceType

from qlae_kernels import FusedLatentQuantizer, LatentQuantizerOutput, available_backends, latent_quantize
from qlae_kernels.backends import BACKENDS, select_backend
from qlae_kernels.latent_quantize_triton import MOST_UNROLLED_CODES

if not torch.cuda.is_available():
    pytest.skip("needs a GPU; torch.cuda.is_available() is False", allow_module_level=True)

GPU = torch.device("cuda", torch.cuda.current_device())
GPU_BACKENDS = [name for name in available_backends() if "cpu" not in BACKENDS[name].DEVICE_TYPES]
WEIGHTS = {"quantization_weight": 0.75, "commitment_weight": 0.25}
dtypes = pytest.mark.parametrize("dtype", VALUE_DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


@pytest.fixture(params=GPU_BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """The name of a backend that serves GPUs with kernels of its own."""
    return request.param


def test_auto_takes_kernels_on_a_gpu() -> None:
    assert GPU_BACKENDS, "no GPU backend is available on a machine with a GPU"
    assert select_backend("auto", "cuda") is BACKENDS[GPU_BACKENDS[0]]


# Equal results at every size


def make_codebook(kind: str, rows: int, levels: int, compute: torch.dtype, seed: int = 0) -> Tensor:
    """Codes [rows, levels] that are hard to search in one way each."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randn(rows, levels, generator=generator, dtype=torch.float64)
    if kind == "sorted":
        codes = codes.sort(1).values
    elif kind == "tied":
        # Multiples of 1/4, so that many z lie exactly between two codes, and codes occur several times.
        codes = (4 * codes).round() / 4
    elif kind == "duplicates":
        codes = codes[:, torch.randint(max(1, levels // 3), (levels,), generator=generator)]
    elif kind == "close":
        codes = 1 + torch.finfo(compute).eps * torch.randint(2 * levels, (rows, levels), generator=generator)
    elif kind == "nan":
        codes[::2, levels // 2] = math.nan
    elif kind == "infinite":
        codes[::2, 0], codes[1::3, -1] = math.inf, -math.inf
    return codes.to(compute)


KINDS = ("random", "sorted", "tied", "duplicates", "close", "nan", "infinite")


def make_latents(codebook: Tensor, batch: int, num_latents: int, inner: int, dtype: torch.dtype) -> Tensor:
    """z [batch, num_latents, inner]: codes, midpoints of codes and their neighbours, random, far and not finite."""
    generator = torch.Generator().manual_seed(batch + num_latents + inner)
    shape = (batch, num_latents, inner)
    rows = torch.arange(num_latents).view(1, -1, 1) % codebook.size(0)
    one, other = (
        codebook.double()[rows, torch.randint(codebook.size(1), shape, generator=generator)] for _ in range(2)
    )
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    kind = torch.randint(64, shape, generator=generator)
    z = torch.where(kind < 16, one, torch.where(kind < 32, one / 2 + other / 2, noise)).to(dtype)
    # A unit in the last place up or down.
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    step = torch.randint(-1, 2, shape, generator=generator).to(integers)
    z = torch.where(kind % 2 == 0, z, (z.view(integers) + step).view(dtype))
    for place, value in ((63, math.nan), (62, math.inf), (61, -math.inf), (60, 3e4), (59, 0.0), (58, -0.0)):
        z = z.masked_fill(kind == place, value)
    return z


def assert_equals_cpu(backend: str, z: Tensor, codebook: Tensor, **options: object) -> None:
    """Indices and codes are those of the CPU kernels to the bit, and the loss is within rounding."""
    want = latent_quantize(z, codebook, backend="cpu", **options, **WEIGHTS)
    got = on_device.latent_quantize(z, codebook, backend=backend, **options, **WEIGHTS)
    assert_same_bits(got.indices, want.indices)
    assert_same_bits(got.quantized, want.quantized)
    assert got.quantized.stride() == want.quantized.stride()
    if want.loss.isfinite():
        unit = torch.finfo(want.loss.dtype).eps
        torch.testing.assert_close(got.loss, want.loss, rtol=unit * (8 * math.sqrt(z.numel()) + 8), atol=1e-37)
    else:
        assert not got.loss.isfinite()


@pytest.mark.usefixtures("poisoned_memory")
class TestEqualToTheCpu:
    """Indices and codes to the bit."""

    @dtypes
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("levels", [1, 2, 3, 10, 16, 17, 64, 256, 1000, 4096])
    def test_number_of_codes(self, backend: str, levels: int, kind: str, dtype: torch.dtype) -> None:
        codebook = make_codebook(kind, 5, levels, compute_dtype(dtype))
        for batch, inner in ((1, 1), (77, 1), (3000, 1), (5, 49)):
            z = make_latents(codebook, batch, 5, inner, dtype)
            assert_equals_cpu(backend, z, codebook)

    @pytest.mark.parametrize("num_latents", [1, 2, 3, 5, 12, 16, 17, 64, 130, 1000, 5000])
    @pytest.mark.parametrize("levels", [3, 10, 100])
    def test_number_of_latents(self, backend: str, num_latents: int, levels: int) -> None:
        for dtype in VALUE_DTYPES:
            for rows in (1, num_latents):
                codebook = make_codebook("random", rows, levels, compute_dtype(dtype), seed=num_latents)
                for batch, inner in ((1, 1), (33, 1), (400, 1), (3, 7)):
                    z = make_latents(codebook, batch, num_latents, inner, dtype)
                    assert_equals_cpu(backend, z, codebook)

    @pytest.mark.parametrize("inner", [1, 2, 5, 49, 64, 4096])
    @pytest.mark.parametrize("levels", [2, 10, 65])
    def test_inner_size(self, backend: str, inner: int, levels: int) -> None:
        for dtype in VALUE_DTYPES:
            for num_latents in (1, 3, 12):
                codebook = make_codebook("random", num_latents, levels, compute_dtype(dtype), seed=inner)
                for batch in (1, 2, 37):
                    z = make_latents(codebook, batch, num_latents, inner, dtype)
                    assert_equals_cpu(backend, z, codebook)
                    assert_equals_cpu(backend, z.movedim(1, -1), codebook, channel_dim=-1)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
    @pytest.mark.parametrize("num_latents", [1, 5, 16])
    def test_number_of_elements(self, backend: str, num_latents: int, dtype: torch.dtype) -> None:
        codebook = make_codebook("random", num_latents, 10, compute_dtype(dtype))
        powers = [2**power for power in range(0, 23)]
        for elements in sorted({size + step for size in powers for step in (-1, 0, 1) if 0 < size + step <= 2**22}):
            batch = -(-elements // num_latents)
            if batch * num_latents > 2**17 and elements not in powers:
                continue
            assert_equals_cpu(backend, make_latents(codebook, batch, num_latents, 1, dtype), codebook)

    @dtypes
    @pytest.mark.parametrize("offset", range(1, 9))
    def test_memory_off_its_alignment(self, backend: str, offset: int, dtype: torch.dtype) -> None:
        for num_latents, batch in ((12, 128), (16, 5000), (3, 7)):
            codebook = make_codebook("random", num_latents, 10, compute_dtype(dtype))
            values = make_latents(codebook, batch, num_latents, 1, dtype)[..., 0]
            memory = torch.full((values.numel() + offset,), -7.0, dtype=dtype)
            z = memory[offset:].view(values.shape).copy_(values)
            wide = torch.full((codebook.numel() + offset,), -7.0, dtype=codebook.dtype)
            assert_equals_cpu(backend, z, wide[offset:].view(codebook.shape).copy_(codebook))

    @pytest.mark.parametrize("seed", range(40))
    def test_drawn_calls(self, backend: str, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(choices: list) -> object:
            return choices[int(torch.randint(len(choices), (), generator=generator))]

        dtype = draw(list(VALUE_DTYPES))
        levels = draw([1, 2, 3, 10, 16, 17, 64, 256, 1000])
        num_latents = draw([1, 2, 3, 5, 12, 16, 17, 64, 130, 1000])
        inner = draw([1, 1, 1, 2, 5, 49, 64, 4096])
        elements = draw([1, 100, 10_000, 100_000, 1_000_000])
        batch = max(1, elements // (num_latents * inner))
        rows = draw([1, num_latents])
        codebook = make_codebook(draw(list(KINDS)), rows, levels, compute_dtype(dtype), seed)
        ragged = [1 + (37 * row) % levels for row in range(rows)]
        options = {
            "levels": draw([None, ragged]),
            "index_dtype": draw([torch.int16, torch.int32, torch.int64]),
        }
        assert_equals_cpu(backend, make_latents(codebook, batch, num_latents, inner, dtype), codebook, **options)


def expected_gradients(z: Tensor, codebook: Tensor, indices: Tensor, grad: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Gradients of z [N, D] and of the codebook for a gradient 1 of the loss, in float64, each with its bound."""
    unit = torch.finfo(compute_dtype(z.dtype)).eps / 2
    latents = torch.arange(codebook.size(0))
    codes = codebook.double()[latents, indices.long()]
    residual = z.double() - codes
    scale = 2 / z.numel()

    def sums(values: Tensor) -> Tensor:
        position = (indices.long() + codebook.size(1) * latents).flatten()
        return torch.zeros(codebook.numel(), dtype=torch.float64).index_add_(0, position, values.flatten())

    from_loss = scale * WEIGHTS["commitment_weight"] * residual
    to_codes = scale * WEIGHTS["quantization_weight"] * residual
    eps = torch.finfo(z.dtype).eps
    # However many terms there are, none passes through more than some thousand roundings.
    of_a_sum = unit * (sums(torch.ones_like(residual)).clamp(max=4096) + 8)
    return [
        (grad.double() + from_loss, 8 * unit * from_loss.abs() + eps * (grad.double().abs() + from_loss.abs()) + 1e-38),
        (-sums(to_codes).view_as(codebook), (of_a_sum * sums(to_codes.abs())).view_as(codebook) + 1e-38),
    ]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("levels", [1, 2, 10, 64, 1000, 4096])
def test_gradients_at_every_size(backend: str, levels: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(levels)
    for batch, num_latents in ((1, 1), (128, 12), (3001, 5), (1_000, 300), (150_000, 16)):
        z = torch.randn(batch, num_latents, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        grad = torch.randn(batch, num_latents, generator=generator, dtype=torch.float64).to(dtype)
        codebook = make_codebook("random", num_latents, levels, compute_dtype(dtype), batch).requires_grad_()
        output = on_device.latent_quantize(z, codebook, backend=backend, **WEIGHTS)
        incoming = (grad, torch.ones_like(output.loss))
        got = torch.autograd.grad((output.quantized, output.loss), (z, codebook), incoming)
        expected = expected_gradients(z.detach(), codebook.detach(), output.indices, grad)
        for value, (wanted, bound) in zip(got, expected, strict=True):
            assert_within(value, wanted, bound)


# One step on the device


def make_step(
    batch: int, num_latents: int = 12, levels: int = 10, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z, codebook, and gradients of quantized and loss, on the GPU."""
    generator = torch.Generator().manual_seed(seed)
    z, grad = (torch.randn(batch, num_latents, generator=generator).to(GPU, dtype) for _ in range(2))
    codebook = torch.randn(num_latents, levels, generator=generator).to(GPU)
    return z.requires_grad_(), codebook.requires_grad_(), grad, torch.ones((), device=GPU)


def run_step(backend: str, z: Tensor, codebook: Tensor, grad: Tensor, grad_loss: Tensor) -> tuple[Tensor, ...]:
    """quantized, indices, loss and both gradients."""
    output = latent_quantize(z, codebook, backend=backend)
    gradients = torch.autograd.grad((output.quantized, output.loss), (z, codebook), (grad, grad_loss))
    return (*(tensor.detach() for tensor in output), *gradients)


def assert_all_same(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    for one, other in zip(got, want, strict=True):
        assert_same_bits(one, other)


STEPS = [(128, 12, 10), (100_000, 5, 10), (70_000, 16, 300), (3, 2000, 4), (65_536, 1, 16)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", STEPS, ids=str)
def test_the_same_bits_in_every_run(backend: str, sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    step = make_step(*sizes, dtype)
    want = run_step(backend, *step)
    for _ in range(20):
        assert_all_same(run_step(backend, *step), want)


def device_work(function: Callable[[], object]) -> list[str]:
    """The names of the kernels, copies and fills that the call gives the GPU."""
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        kept = function()
        torch.cuda.synchronize()
    del kept
    return [event.name for event in profile.events() if event.device_type is DeviceType.CUDA]


@pytest.mark.parametrize("sizes", [(128, 12, 10), (1_048_576, 16, 10), (1_048_576, 16, 256), (4096, 16, 4096)], ids=str)
def test_one_launch_each_way(backend: str, sizes: tuple[int, int, int]) -> None:
    z, codebook, grad, grad_loss = step = make_step(*sizes)
    for _ in range(3):
        run_step(backend, *step)
    device_work(lambda: run_step(backend, *step))
    outputs: list[LatentQuantizerOutput] = []
    forward = device_work(lambda: outputs.append(latent_quantize(z, codebook, backend=backend)))
    (output,) = outputs
    values = (output.quantized, output.loss)
    backward = device_work(lambda: torch.autograd.grad(values, (z, codebook), (grad, grad_loss)))
    # Triton sorts more codes than it compares one by one with a launch of its own.
    launches = 2 if backend == "triton" and sizes[2] > MOST_UNROLLED_CODES[torch.float32] else 1
    assert len(forward) == launches, forward
    assert len(backward) == launches, backward


@contextmanager
def no_waiting() -> Iterator[None]:
    """An error where the host waits for the GPU."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("sizes", [(128, 12, 10), (100_000, 16, 10), (1000, 16, 1000)], ids=str)
def test_the_host_never_waits(backend: str, sizes: tuple[int, int, int]) -> None:
    step = make_step(*sizes)
    quantizer = FusedLatentQuantizer(sizes[1], [sizes[2]] * (sizes[1] - 1) + [1], backend=backend, device=GPU)
    run_step(backend, *step)
    quantizer(step[0])
    with no_waiting():
        run_step(backend, *step)
        quantizer(step[0]).loss.backward()


@pytest.mark.parametrize("levels", [10, 256])
def test_memory_of_a_step_is_that_of_its_results(backend: str, levels: int) -> None:
    step = make_step(1_048_576, 16, levels)
    run_step(backend, *step)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = run_step(backend, *step)
    extra = torch.cuda.max_memory_allocated() - before
    # All distances would take `levels` times z's 64 MiB; quantized, indices and z's gradient take 3 times.
    assert extra < sum(result.nbytes for result in results) + 40 * 2**20


# Streams


@pytest.mark.parametrize("sizes", [(128, 12, 10), (50_000, 16, 10)], ids=str)
def test_a_stream_of_its_own(backend: str, sizes: tuple[int, int, int]) -> None:
    step = make_step(*sizes)
    want = run_step(backend, *step)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # The input becomes ready late on this stream: a launch on another would read it before.
        late = torch.full_like(step[0], 3.0).requires_grad_()
        torch.cuda._sleep(20_000_000)
        with torch.no_grad():
            late.copy_(step[0])
        got = run_step(backend, late, *step[1:])
    stream.synchronize()
    assert_all_same(got, want)


@pytest.mark.parametrize("sizes", [(128, 12, 10), (200_000, 16, 10), (20_000, 16, 300)], ids=str)
def test_two_streams_at_once(backend: str, sizes: tuple[int, int, int]) -> None:
    steps = [make_step(*sizes, seed=seed) for seed in range(2)]
    wanted = [run_step(backend, *step) for step in steps]
    streams = [torch.cuda.Stream() for _ in steps]
    torch.cuda.synchronize()
    got: list[list[tuple[Tensor, ...]]] = [[], []]
    for _ in range(20):
        for step, stream, results in zip(steps, streams, got, strict=True):
            with torch.cuda.stream(stream):
                results.append(run_step(backend, *step))
    torch.cuda.synchronize()
    for want, results in zip(wanted, got, strict=True):
        for result in results:
            assert_all_same(result, want)


# Graphs


class CapturedStep:
    """Forward and backward of a quantizer in a CUDA graph, with memory for its inputs."""

    def __init__(self, backend: str, batch: int, num_latents: int = 12, levels: int = 10) -> None:
        self.inputs = make_step(batch, num_latents, levels)
        self.backend = backend
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                run_step(backend, *self.inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.results = run_step(backend, *self.inputs)

    def replay(self, step: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The results for new inputs; they are overwritten by the next replay."""
        with torch.no_grad():
            for static, new in zip(self.inputs, step, strict=True):
                static.copy_(new)
        self.graph.replay()
        return self.results


@pytest.mark.parametrize("sizes", [(128, 12, 10), (40_000, 16, 10), (3000, 16, 300)], ids=str)
def test_a_captured_step_replays_with_new_inputs(backend: str, sizes: tuple[int, int, int]) -> None:
    captured = CapturedStep(backend, *sizes)
    for seed in range(1, 6):
        step = make_step(*sizes, seed=seed)
        assert_all_same(captured.replay(step), run_step(backend, *step))


def test_two_graphs_in_turn(backend: str) -> None:
    sizes = [(128, 12, 10), (30_000, 16, 40)]
    captured = [CapturedStep(backend, *size) for size in sizes]
    for seed in range(1, 6):
        steps = [make_step(*size, seed=seed) for size in sizes]
        wanted = [run_step(backend, *step) for step in steps]
        for graph, step, want in zip(captured, steps, wanted, strict=True):
            assert_all_same(graph.replay(step), want)


def test_two_graphs_and_an_eager_step_at_once(backend: str) -> None:
    size = (100_000, 16, 10)
    captured = [CapturedStep(backend, *size) for _ in range(2)]
    steps = [make_step(*size, seed=seed) for seed in (1, 2, 3)]
    wanted = [run_step(backend, *step) for step in steps]
    for graph, step in zip(captured, steps, strict=False):
        graph.replay(step)
    streams = [torch.cuda.Stream() for _ in captured]
    torch.cuda.synchronize()
    for _ in range(20):
        for graph, stream in zip(captured, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.graph.replay()
        eager = run_step(backend, *steps[2])
        torch.cuda.synchronize()
        for got, want in zip((*(graph.results for graph in captured), eager), wanted, strict=True):
            assert_all_same(got, want)


def test_a_captured_training_step_learns_as_the_eager_one(backend: str) -> None:
    def make() -> tuple[Autoencoder, torch.optim.SGD, Tensor]:
        torch.manual_seed(0)
        model = Autoencoder(backend).to(GPU)
        return model, torch.optim.SGD(model.parameters(), lr=0.1), torch.zeros(64, 8, device=GPU)

    batches = torch.randn(10, 64, 8, generator=torch.Generator().manual_seed(1)).to(GPU)
    eager, optimizer, _ = make()
    for x in (batches[0],) * 3 + tuple(batches):
        optimizer.zero_grad(set_to_none=False)
        eager(x)[0].backward()
        optimizer.step()

    model, optimizer, static_x = make()
    static_x.copy_(batches[0])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            optimizer.zero_grad(set_to_none=False)
            model(static_x)[0].backward()
            optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.zero_grad(set_to_none=False)
        model(static_x)[0].backward()
        optimizer.step()
    # Capturing runs nothing.
    for x in batches:
        static_x.copy_(x)
        graph.replay()
    for one, other in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


# Compiled


class Autoencoder(nn.Module):
    """A quantizer between two linear layers."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.encoder = nn.Linear(8, 3)
        self.quantizer = FusedLatentQuantizer(3, [10, 4, 7], backend=backend, **WEIGHTS)
        self.decoder = nn.Linear(3, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        z = 3 * self.encoder(x)
        quantized, indices, loss = self.quantizer(z)
        return (self.decoder(quantized) - x).square().mean() + loss, indices, quantized, z


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_training_step_equals_the_eager_one(backend: str, mode: str) -> None:
    torch.compiler.reset()
    torch.manual_seed(0)
    model = Autoencoder(backend).to(GPU)
    compiled = torch.compile(model, fullgraph=True, dynamic=False, mode=mode)
    # Under reduce-overhead the first calls warm up and record, the later ones replay.
    for batch in (700,) * 5 + (64,) * 5:
        x = torch.randn(batch, 8, device=GPU)
        model.zero_grad()
        torch.compiler.cudagraph_mark_step_begin()
        objective, indices, quantized, z = compiled(x)
        objective.backward()
        got = [p.grad.clone() for p in model.parameters()]
        # From the same latents: the layer before may be rounded otherwise when compiled.
        want = latent_quantize(z.detach().clone(), model.quantizer.codebook, levels=(10, 4, 7), backend=backend)
        assert_same_bits(indices, want.indices)
        assert_same_bits(quantized, want.quantized)
        kept = objective.detach().clone()
        model.zero_grad()
        objective = model(x)[0]
        objective.backward()
        torch.testing.assert_close(kept, objective.detach(), rtol=1e-4, atol=1e-5)
        for one, p in zip(got, model.parameters(), strict=True):
            torch.testing.assert_close(one, p.grad, rtol=1e-3, atol=1e-4)


def test_a_compiled_call_in_each_dtype(backend: str) -> None:
    torch.compiler.reset()

    @torch.compile(fullgraph=True, dynamic=True)
    def step(z: Tensor, codebook: Tensor) -> tuple[Tensor, ...]:
        output = latent_quantize(2 * z, codebook, backend=backend, **WEIGHTS)
        return output.quantized, output.indices, output.loss

    for dtype in (torch.float32, torch.bfloat16):
        for batch in (50, 3000):
            z, codebook, _, _ = make_step(batch, 12, 10, dtype)
            want = latent_quantize(2 * z, codebook, backend=backend, **WEIGHTS)
            assert_all_same(step(z, codebook), tuple(want))


# The module


def test_every_method_of_the_module_agrees_with_the_cpu(backend: str) -> None:
    on_gpu = FusedLatentQuantizer(4, [10, 3, 7, 10], backend=backend, device=GPU)
    on_cpu = FusedLatentQuantizer(4, [10, 3, 7, 10])
    assert_same_bits(on_gpu.codebook.cpu(), on_cpu.codebook)
    z = torch.randn(50, 4, 3, generator=torch.Generator().manual_seed(0))
    indices = on_cpu.encode(z)
    assert_same_bits(on_gpu.encode(z.to(GPU)).cpu(), indices)
    assert_same_bits(on_gpu.decode(indices.to(GPU)).cpu(), on_cpu.decode(indices))
    assert_same_bits(on_gpu.pack(indices.to(GPU)).cpu(), on_cpu.pack(indices))
    assert_same_bits(on_gpu.unpack(on_cpu.pack(indices).to(GPU)).cpu(), indices)
    for got, want in zip(on_gpu.usage(indices.to(GPU)), on_cpu.usage(indices), strict=True):
        torch.testing.assert_close(got.cpu(), want)
    assert on_gpu.sample(5, torch.Generator(GPU).manual_seed(0)).shape == (5, 4)
    moved = on_cpu.to(GPU)
    assert_same_bits(moved(z.to(GPU)).indices.cpu(), indices)


# Errors


def test_tensors_on_two_devices_are_refused(backend: str) -> None:
    for z, codebook in ((GPU, "cpu"), ("cpu", GPU)):
        for name in (backend, "auto"):
            with pytest.raises(ValueError, match=r"one device.*(cuda.*cpu|cpu.*cuda)"):
                latent_quantize(torch.zeros(4, 3, device=z), torch.zeros(3, 5, device=codebook), backend=name)


def test_a_backend_refuses_the_other_device(backend: str) -> None:
    with pytest.raises(RuntimeError, match=rf"'{backend}' serves tensors on cuda, not on cpu"):
        latent_quantize(torch.zeros(4, 3), torch.zeros(3, 5), backend=backend)
    with pytest.raises(RuntimeError, match="'cpu' serves tensors on cpu, not on cuda"):
        latent_quantize(torch.zeros(4, 3, device=GPU), torch.zeros(3, 5, device=GPU), backend="cpu")


# Sizes that pass 2**31 elements


LARGE_LAYOUTS = [((134_217_729 + 7, 16), 1), ((3, 2, 357_913_942 + 5), 1)]


@pytest.mark.large
@pytest.mark.parametrize(("shape", "channel_dim"), LARGE_LAYOUTS, ids=["latents last", "latents outside"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_more_than_2_to_31_elements(backend: str, shape: tuple[int, ...], channel_dim: int, dtype: torch.dtype) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated() < 40 * 2**30:
        pytest.skip(f"needs 40 GiB of free GPU memory; {free / 2**30:.0f} are")
    torch.cuda.empty_cache()
    assert math.prod(shape) > 2**31
    z = torch.empty(shape, dtype=dtype, device=GPU).uniform_(-1, 1).requires_grad_()
    codebook = torch.linspace(-0.9, 0.9, 10, device=GPU).repeat(shape[1], 1).requires_grad_()
    options = {"index_dtype": torch.uint8, "backend": backend, "channel_dim": channel_dim, **WEIGHTS}
    output = latent_quantize(z, codebook, **options)
    # With this gradient of the loss the scale 2/M cancels, and half values do not underflow.
    grad_loss = torch.tensor(z.numel() / 2, device=GPU)
    grad_z, grad_codebook = torch.autograd.grad(output.loss, (z, codebook), grad_loss)
    # The same latents in pieces that 31 bits can count.
    cut = 0 if len(shape) == 2 else 2
    loss, sums = 0.0, torch.zeros_like(codebook, dtype=torch.float64)
    with torch.no_grad():
        pieces = [tensor.split(-(-shape[cut] // 7), cut) for tensor in (z, output.quantized, output.indices, grad_z)]
    for latents, quantized, indices, grad in zip(*pieces, strict=True):
        latents = latents.clone(memory_format=torch.contiguous_format).requires_grad_()
        codes = codebook.detach().requires_grad_()
        part = latent_quantize(latents, codes, **options)
        grad_part = torch.tensor(latents.numel() / 2, device=GPU)
        part_grad_z, part_grad_codebook = torch.autograd.grad(part.loss, (latents, codes), grad_part)
        assert torch.equal(part.quantized, quantized)
        assert torch.equal(part.indices, indices)
        torch.testing.assert_close(grad, part_grad_z)
        loss += part.loss.item() * latents.numel() / z.numel()
        sums += part_grad_codebook.double()
        del latents, part, part_grad_z
    assert output.loss.item() == pytest.approx(loss, rel=1e-4)
    # Residuals are 0.05 on average, and each code sums as many as its share of z.
    sizes = 0.05 * z.numel() / codebook.numel()
    torch.testing.assert_close(grad_codebook.double(), sums, rtol=0, atol=1e-5 * sizes)
    del z, output, grad_z, pieces
    torch.cuda.empty_cache()
