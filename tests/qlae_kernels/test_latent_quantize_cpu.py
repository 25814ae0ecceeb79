"""What is particular to the CPU kernels: instruction sets, threads, searches, traversals, and the pool of buffers."""

import threading
from collections.abc import Iterator

import pytest
import torch
from latent_quantize_statement import (
    INDEX_DTYPES,
    LONGEST_FLOAT_SUM,
    VALUE_DTYPES,
    assert_same_bits,
    assert_within,
    compute_dtype,
    gamma,
    gradients,
    nearest,
    quantized_at,
)
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from qlae_kernels import latent_quantize, latent_quantize_cpu

pytestmark = pytest.mark.usefixtures("poisoned_memory")

WEIGHTS = {"quantization_weight": 0.75, "commitment_weight": 0.25}
LARGE = 9 << 20  # bytes of an output that surely comes from the pool
dtypes = pytest.mark.parametrize("dtype", VALUE_DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


@pytest.fixture
def pool() -> Iterator[None]:
    """An empty pool of the size that it has at the start, before and after."""
    latent_quantize_cpu.empty_cache()
    yield
    latent_quantize_cpu.set_max_cached_bytes(1 << 30)
    latent_quantize_cpu.empty_cache()


def problem(
    shape: tuple[int, ...], levels: int, dtype: torch.dtype = torch.float32, rows: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """z with latents at dimension 1, a codebook, and a gradient of `quantized`."""
    generator = torch.Generator().manual_seed(sum(shape) + levels)
    z = torch.randn(shape, generator=generator).to(dtype)
    codebook = torch.randn(rows or shape[1], levels, generator=generator).to(compute_dtype(dtype))
    return z, codebook, torch.randn(shape, generator=generator).to(dtype)


def forward_and_backward(
    z: Tensor, codebook: Tensor, grad_quantized: Tensor, **options: object
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Quantized, indices, grad z, loss and grad codebook."""
    z, codebook = z.detach().requires_grad_(), codebook.detach().requires_grad_()
    output = latent_quantize(z, codebook, backend="cpu", **(WEIGHTS | options))
    torch.autograd.backward((output.quantized, output.loss), (grad_quantized, torch.ones_like(output.loss)))
    return output.quantized.detach(), output.indices, z.grad, output.loss.detach(), codebook.grad


def test_instruction_sets_are_known_and_can_be_chosen() -> None:
    names = latent_quantize_cpu.instruction_sets()
    assert names[0] == "baseline"
    assert set(names) <= {"baseline", "avx2", "avx512"}
    before = latent_quantize_cpu.active_instruction_set()
    for name in names:
        with latent_quantize_cpu.use_instruction_set(name):
            assert latent_quantize_cpu.active_instruction_set() == name
        assert latent_quantize_cpu.active_instruction_set() == before


def test_an_instruction_set_is_put_back_after_an_error() -> None:
    before = latent_quantize_cpu.active_instruction_set()
    with pytest.raises(ZeroDivisionError), latent_quantize_cpu.use_instruction_set("baseline"):
        raise ZeroDivisionError
    assert latent_quantize_cpu.active_instruction_set() == before


def test_an_unknown_instruction_set_is_an_error_that_names_the_known() -> None:
    with pytest.raises(ValueError, match=r"'sse9'.*baseline"), latent_quantize_cpu.use_instruction_set("sse9"):
        pass


# Every traversal with few and with many codes, in more than one part; with each search of the fixture these are all.
TRAVERSALS = [
    pytest.param((20_011, 3), 4, None, id="periodic, few codes"),
    pytest.param((5003, 12), 100, None, id="periodic, many codes"),
    pytest.param((500, 130), 5, None, id="long period"),
    pytest.param((300, 40, 5), 8, None, id="period with an inner dimension"),
    pytest.param((5, 3, 4001), 8, None, id="runs, few codes"),
    pytest.param((2, 3, 9001), 100, None, id="runs, many codes"),
    pytest.param((2, 5000, 7), 10, None, id="short runs"),
    pytest.param((12_001, 5), 8, 1, id="shared, few codes"),
    pytest.param((9001, 5), 100, 1, id="shared, many codes"),
    pytest.param((600, 700), 16, None, id="groups of latents, few codes"),
    pytest.param((530, 140), 700, None, id="groups of latents, many codes"),
    pytest.param((300, 200), 700, None, id="groups of latents, short sums"),
    pytest.param((850, 600), 100, None, id="groups whose samples the threads divide"),
    pytest.param((900, 33, 5), 900, None, id="groups of latents with several elements"),
    pytest.param((5, 40, 201), 1000, None, id="runs one latent at a time"),
]
traversals = pytest.mark.parametrize(("shape", "levels", "rows"), TRAVERSALS)


@dtypes
@traversals
def test_instruction_sets_agree(
    search: None, shape: tuple[int, ...], levels: int, rows: int | None, dtype: torch.dtype
) -> None:
    z, codebook, grad_quantized = problem(shape, levels, dtype, rows)
    z.flatten()[5] = 40.0
    expected = gradients(z, codebook, grad_quantized, 1.0, longest_sum=LONGEST_FLOAT_SUM, **WEIGHTS)
    results = {}
    for name in latent_quantize_cpu.instruction_sets():
        with latent_quantize_cpu.use_instruction_set(name):
            results[name] = forward_and_backward(z, codebook, grad_quantized)
    for *exact, loss, grad_codebook in results.values():
        for got, want in zip(exact, results["baseline"][:3], strict=True):
            assert_same_bits(got, want)
        assert_within(loss, expected.loss, expected.loss_bound)
        assert_within(grad_codebook, expected.grad_codebook, expected.grad_codebook_bound)


@traversals
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float64], ids=["float32", "bfloat16", "float64"]
)
def test_the_same_bits_in_every_run_and_with_any_number_of_threads(
    instruction_set: str, search: None, shape: tuple[int, ...], levels: int, rows: int | None, dtype: torch.dtype
) -> None:
    z, codebook, grad_quantized = problem(shape, levels, dtype, rows)
    first = forward_and_backward(z, codebook, grad_quantized)
    for threads in (1, 2, 2, 3, 5):
        torch.set_num_threads(threads)
        for got, want in zip(forward_and_backward(z, codebook, grad_quantized), first, strict=True):
            assert_same_bits(got, want)


def sizes_around_the_choices() -> Iterator[tuple[tuple[int, ...], int]]:
    """Shapes and levels on both sides of every boundary at which the kernels choose another way."""
    for lanes in (2, 4, 8, 16):
        yield from (((samples, 1), 3) for samples in (lanes - 1, lanes, lanes + 1, 4 * lanes - 1, 4 * lanes + 1))
        yield from (((2, 3, inner), 3) for inner in (4 * lanes - 1, 4 * lanes, 4 * lanes + 1))
        yield from (((600, 2), levels) for levels in (4 * lanes, 4 * lanes + 1))
    yield from (((samples, 3), 100) for samples in (511, 512, 513))
    yield from (((samples, 3), 16) for samples in (2047, 2048, 2049))
    yield from (((50, 2), levels) for levels in (64, 65))
    yield from (((520, period), levels) for period in (127, 128, 129) for levels in (3, 70))
    yield from (((3, 64, 7), levels) for levels in (292, 293))
    yield from (((1, 1, inner), levels) for inner in (4095, 4096, 4097, 8192, 8193) for levels in (3, 100))
    yield from (((samples, 16), 3) for samples in (1023, 1024, 1025, 2047, 2048, 2049))
    yield from (((samples, 7), 5) for samples in (1, 2, 3, 5, 15, 16, 17, 31, 33, 63, 65, 1171))
    yield ((1, 40, 3), 300)
    yield ((3, 8200), 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=["float32", "float64", "float16"])
def test_sizes_around_every_choice(search: None, dtype: torch.dtype) -> None:
    for shape, levels in sizes_around_the_choices():
        z, codebook, grad_quantized = problem(shape, levels, dtype)
        indices = nearest(z, codebook)
        quantized = quantized_at(indices, z, codebook)
        expected = gradients(z, codebook, grad_quantized, 1.0, **WEIGHTS)
        for name in latent_quantize_cpu.instruction_sets():
            with latent_quantize_cpu.use_instruction_set(name):
                got = forward_and_backward(z, codebook, grad_quantized)
            assert_same_bits(got[0], quantized)
            assert_same_bits(got[1], indices.to(torch.int32))
            assert_within(got[2], expected.grad_z, expected.grad_z_bound)
            assert_within(got[3], expected.loss, expected.loss_bound)
            assert_within(got[4], expected.grad_codebook, expected.grad_codebook_bound)


def in_order(codes: Tensor) -> Tensor:
    return codes.sort(1).values


# Ordered codes are searched with one of several in the cells, others are scanned.
ORDERS = {
    "ascending": in_order,
    "descending": lambda codes: in_order(codes).flip(1),
    "equal ones": lambda codes: in_order(codes).round(decimals=1),
    "infinite ends": lambda codes: in_order(codes).index_fill(1, torch.tensor([0, codes.size(1) - 1]), torch.inf),
    "a NaN": lambda codes: codes.index_fill(1, torch.tensor([codes.size(1) // 2]), torch.nan),
    "none finite": lambda codes: torch.full_like(codes, -torch.inf),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("order", ORDERS)
def test_fewer_samples_than_codes(instruction_set: str, order: str, dtype: torch.dtype) -> None:
    for samples, levels in (
        (1, 17),
        (1, 4097),
        (2, 65),
        (3, 100),
        (5, 9),
        (15, 4096),
        (16, 4096),
        (70, 600),
        (200, 4099),
    ):
        z, codebook, _ = problem((samples, 3), levels, dtype)
        z, codebook = z.detach(), ORDERS[order](codebook.detach())
        z[0] = torch.tensor([9.0, -9.0, codebook[2, levels // 3].nan_to_num()])
        got = latent_quantize(z, codebook, backend="cpu").indices
        assert_same_bits(got, nearest(z, codebook).to(torch.int32))


@pytest.mark.parametrize("index_dtype", INDEX_DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("shape", [(75_000, 32), (2, 2, 600_000), (1_200_001, 2)], ids=str)
def test_outputs_larger_than_the_cache(
    instruction_set: str, search: None, pool: None, shape: tuple[int, ...], index_dtype: torch.dtype
) -> None:
    torch.set_num_threads(2)
    z, codebook, grad_quantized = problem(shape, 3)
    indices = nearest(z, codebook)
    got = forward_and_backward(z, codebook, grad_quantized, index_dtype=index_dtype)
    assert_same_bits(got[0], quantized_at(indices, z, codebook))
    assert_same_bits(got[1], indices.to(index_dtype))
    residual = (z - got[0]) * torch.tensor(2 / z.numel() * WEIGHTS["commitment_weight"])
    # The scale may be rounded otherwise here, and so may the product.
    torch.testing.assert_close(got[2], grad_quantized + residual, rtol=4e-7, atol=1e-12)


@pytest.mark.parametrize("shape", [(4_000_000, 2), (1, 2, 4_000_000)], ids=["periodic", "runs"])
def test_sums_do_not_lose_what_a_single_float_would(search: None, shape: tuple[int, ...]) -> None:
    # Equal residuals are rounded the same way again and again. With four lanes and 64 parts a lane meets 31,250 of
    # them; one float sum over so many of these is off by 4e-4, almost three times the bound.
    residual = torch.tensor(0.51514655)
    codebook = torch.tensor([0.0, 9.0]).repeat(shape[1], 1).requires_grad_()
    with latent_quantize_cpu.use_instruction_set("baseline"):
        loss = latent_quantize(residual.expand(shape).contiguous(), codebook, backend="cpu", **WEIGHTS).loss
        loss.backward()
    relative = gamma(LONGEST_FLOAT_SUM + 8, torch.float32)
    want = sum(WEIGHTS.values()) * residual.double().square()
    assert_within(loss, want, relative * want)
    want = -2 * WEIGHTS["quantization_weight"] / shape[1] * residual.double().expand(shape[1])
    assert_within(codebook.grad[:, 0], want, relative * want.abs())
    assert (codebook.grad[:, 1] == 0).all()


def test_calls_from_several_python_threads(instruction_set: str) -> None:
    problems = [problem((4000 + 100 * number, 12), 3 + 30 * number) for number in range(4)]
    expected = [forward_and_backward(*arguments) for arguments in problems]
    results: dict[int, list[tuple[Tensor, ...]]] = {}

    def work(number: int) -> None:
        results[number] = [forward_and_backward(*problems[number]) for _ in range(5)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, want in enumerate(expected):
        for got in results[number]:
            for one, other in zip(got, want, strict=True):
                assert_same_bits(one, other)


class Quantized(Dataset[Tensor]):
    """A data set whose items are quantized by the process that reads them."""

    def __init__(self, z: Tensor, codebook: Tensor) -> None:
        self.z, self.codebook = z, codebook

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Tensor:
        return latent_quantize(self.z, self.codebook, backend="cpu").quantized


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_worker_processes_after_threads_have_run() -> None:
    torch.set_num_threads(2)
    z, codebook, _ = problem((20_000, 4), 10)
    want = latent_quantize(z, codebook, backend="cpu").quantized
    loader = DataLoader(
        Quantized(z, codebook), batch_size=None, num_workers=1, timeout=60, multiprocessing_context="fork"
    )
    for got in loader:
        assert torch.equal(got, want)


def test_freed_large_outputs_are_kept_for_reuse(pool: None) -> None:
    z, codebook, _ = problem((LARGE // 4, 1), 3)
    output = latent_quantize(z, codebook, backend="cpu", return_indices=False)
    assert latent_quantize_cpu.cached_bytes() == 0
    address = output.quantized.data_ptr()
    del output
    assert latent_quantize_cpu.cached_bytes() >= LARGE
    assert latent_quantize(z, codebook, backend="cpu").quantized.data_ptr() == address
    assert latent_quantize_cpu.cached_bytes() >= 2 * LARGE
    latent_quantize_cpu.empty_cache()
    assert latent_quantize_cpu.cached_bytes() == 0


def test_small_outputs_leave_the_pool_alone(pool: None) -> None:
    latent_quantize(*problem((100, 3), 3)[:2], backend="cpu")
    assert latent_quantize_cpu.cached_bytes() == 0


def test_the_pool_keeps_no_more_than_its_limit(pool: None) -> None:
    z, codebook, _ = problem((LARGE // 4, 1), 3)
    latent_quantize_cpu.set_max_cached_bytes(0)
    latent_quantize(z, codebook, backend="cpu")
    assert latent_quantize_cpu.cached_bytes() == 0
    latent_quantize_cpu.set_max_cached_bytes(LARGE + (4 << 20))
    latent_quantize(z, codebook, backend="cpu")
    assert LARGE <= latent_quantize_cpu.cached_bytes() <= LARGE + (4 << 20)
    latent_quantize_cpu.set_max_cached_bytes(1)
    assert latent_quantize_cpu.cached_bytes() == 0


def test_a_negative_limit_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"limit.*-1"):
        latent_quantize_cpu.set_max_cached_bytes(-1)


def test_large_outputs_in_use_are_never_handed_out_again(pool: None) -> None:
    z, codebook, _ = problem((LARGE // 4, 1), 3)
    want = quantized_at(nearest(z, codebook), z, codebook)
    kept = []
    for _ in range(3):
        # A view, an alias of its storage and a NumPy array keep the memory as the tensor itself does.
        kept.append(latent_quantize(z, codebook, backend="cpu").quantized[1:])
        kept.append(latent_quantize(z, codebook, backend="cpu").quantized.detach().untyped_storage())
        kept.append(latent_quantize(z, codebook, backend="cpu").quantized.numpy())
    latent_quantize(-z, codebook, backend="cpu")
    for view, storage, array in zip(kept[::3], kept[1::3], kept[2::3], strict=True):
        assert torch.equal(view, want[1:])
        assert torch.equal(torch.empty(0).set_(storage, 0, want.shape), want)
        assert torch.equal(torch.from_numpy(array), want)


@dtypes
def test_large_outputs_of_any_layout(pool: None, dtype: torch.dtype) -> None:
    size = LARGE // dtype.itemsize
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, 3, 1 + size // 1800, 300, generator=generator).to(dtype)
    codebook = torch.randn(3, 5, generator=generator).to(compute_dtype(dtype))
    indices = nearest(z, codebook)
    for latents in (z, z.to(memory_format=torch.channels_last), z.permute(3, 1, 0, 2)):
        latents = latents.detach().requires_grad_()
        output = latent_quantize(latents, codebook, index_dtype=torch.int64, backend="cpu", commitment_weight=1.0)
        output.loss.backward()
        assert output.quantized.stride() == output.indices.stride() == latents.stride()
        want = indices if latents.shape == z.shape else indices.permute(3, 1, 0, 2)
        assert_same_bits(output.indices, want)
        assert_same_bits(output.quantized, quantized_at(want, latents, codebook))
        assert latents.grad.isfinite().all()


def test_large_outputs_behave_as_tensors_do(pool: None) -> None:
    z, codebook, _ = problem((LARGE // 4, 1), 3)
    quantized = latent_quantize(z, codebook, backend="cpu").quantized
    before = quantized.clone()
    quantized.mul_(2).add_(1)
    assert torch.equal(quantized, before * 2 + 1)
    assert torch.equal(quantized.share_memory_(), before * 2 + 1)


@pytest.mark.large
@pytest.mark.parametrize("runs", [False, True], ids=["periodic", "runs"])
def test_more_elements_than_31_bits_count(pool: None, runs: bool) -> None:
    torch.set_num_threads(2)
    generator = torch.Generator().manual_seed(0)
    # The same piece again and again, 2**31 + 2**27 elements in all, so that the result is known from one piece.
    piece = torch.randn(2**20, generator=generator).half()
    repeats = 2**11 + 2**7
    memory = torch.empty(repeats * piece.numel(), dtype=torch.float16)
    memory.view(repeats, -1).copy_(piece)
    shape = (1, 2, memory.numel() // 2) if runs else (memory.numel() // 16, 16)
    codebook = torch.randn(1 if runs else 16, 10, generator=generator)
    if runs:
        # Two latents with the same codes, so that a piece is a piece wherever it lies.
        codebook = codebook.expand(2, 10).contiguous()
    z = memory.view(shape).requires_grad_()
    codebook.requires_grad_()
    output = latent_quantize(z, codebook, index_dtype=torch.uint8, backend="cpu", **WEIGHTS)
    small = piece.view(1, 1, -1) if runs else piece.view(-1, 16)
    codes = codebook.detach()[: 1 if runs else 16]
    indices = nearest(small, codes)
    for got, want in (
        (output.indices, indices.to(torch.uint8)),
        (output.quantized, quantized_at(indices, small, codes)),
    ):
        for row in got.detach().view(repeats, -1):
            assert torch.equal(row, want.flatten())
    # With this gradient of the loss the scale 2/M cancels, and half values do not underflow.
    expected = gradients(small, codes, None, small.numel() / 2, longest_sum=LONGEST_FLOAT_SUM, **WEIGHTS)
    loss = output.loss
    del output, got, row
    latent_quantize_cpu.empty_cache()
    loss.backward(torch.tensor(z.numel() / 2))
    assert_within(loss, expected.loss, expected.loss_bound)
    pieces_per_row = repeats // codebook.size(0) if runs else repeats
    assert_within(
        codebook.grad,
        (pieces_per_row * expected.grad_codebook).expand_as(codebook),
        pieces_per_row * expected.grad_codebook_bound,
    )
    first = z.grad.view(repeats, -1)[0]
    assert_within(first.view(small.shape), expected.grad_z, expected.grad_z_bound)
    for row in z.grad.view(repeats, -1):
        assert torch.equal(row, first)
