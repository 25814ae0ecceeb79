"""The module `FusedLatentQuantizer`."""

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from backend_variants import ONCE, each_backend
from hypothesis import given, settings
from hypothesis import strategies as st
from on_device import device_of
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from qlae_kernels import (
    FusedLatentQuantizer,
    LatentQuantizerOutput,
    latent_quantize,
)

examples = settings(deadline=None, derandomize=True, database=None, max_examples=60)


def quantizer_on(backend: str, *arguments: Any, **options: Any) -> FusedLatentQuantizer:
    """A quantizer on the device that `backend` serves."""
    return FusedLatentQuantizer(*arguments, backend=backend, device=device_of(backend), **options)


def test_defaults_are_those_of_the_paper() -> None:
    quantizer = FusedLatentQuantizer(12)
    assert quantizer.levels == (10,) * 12
    assert (quantizer.quantization_weight, quantizer.commitment_weight) == (0.01, 0.01)
    assert quantizer.codebook.shape == (12, 10)
    assert quantizer.codebook.dtype is torch.float32
    torch.testing.assert_close(quantizer.codebook.detach(), torch.linspace(-0.5, 0.5, 10).repeat(12, 1))
    assert isinstance(quantizer.codebook, nn.Parameter)
    assert quantizer.learnable


@pytest.mark.parametrize("levels", [1, 2, 3, 7, 10, 100])
def test_codes_start_evenly_spaced_with_both_ends(levels: int) -> None:
    codebook = FusedLatentQuantizer(3, levels, init_range=(-2.0, 1.0)).codebook.detach()
    assert (codebook[:, 0] == -2.0).all()
    if levels > 1:
        assert (codebook[:, -1] == 1.0).all()
        spacing = codebook.diff(dim=1)
        # Each code carries at most a few roundings of numbers up to 2.
        torch.testing.assert_close(spacing, torch.full_like(spacing, 3.0 / (levels - 1)), rtol=0, atol=8 * 2.0**-23)


@each_backend
def test_ragged_levels_each_span_the_range(backend: str) -> None:
    quantizer = quantizer_on(backend, 4, [10, 1, 3, 2])
    assert quantizer.codebook.shape == (4, 10)
    assert quantizer.codebook[2, :3].tolist() == [-0.5, 0.0, 0.5]
    assert quantizer.codebook[3, :2].tolist() == [-0.5, 0.5]
    z = torch.linspace(-3, 3, 400, device=device_of(backend)).view(100, 4)
    indices = quantizer(z).indices
    assert indices.amax(0).tolist() == [9, 0, 2, 1]


@pytest.mark.parametrize("backend", [*ONCE, "auto"], indirect=True)
def test_the_call_is_the_function_with_the_arguments_of_the_module(backend: str) -> None:
    z = torch.randn(5, 7, 3, device=device_of(backend), requires_grad=True)
    quantizer = quantizer_on(
        backend,
        3,
        [4, 9, 2],
        channel_dim=-1,
        quantization_weight=0.3,
        commitment_weight=0.7,
        init_range=(-1.0, 2.0),
        index_dtype=torch.uint8,
    )
    got = quantizer(z)
    want = latent_quantize(
        z,
        quantizer.codebook,
        levels=(4, 9, 2),
        channel_dim=-1,
        quantization_weight=0.3,
        commitment_weight=0.7,
        index_dtype=torch.uint8,
        backend=backend,
    )
    assert isinstance(got, LatentQuantizerOutput)
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)
    gradients = [torch.autograd.grad(output.loss, (z, quantizer.codebook)) for output in (got, want)]
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


@each_backend
def test_a_shared_codebook_serves_all_latents(backend: str) -> None:
    shared = quantizer_on(backend, 6, 5, shared_codebook=True)
    assert shared.codebook.shape == (1, 5)
    own = quantizer_on(backend, 6, 5)
    z = torch.randn(30, 6, device=device_of(backend))
    assert torch.equal(shared(z).indices, own(z).indices)
    assert torch.equal(shared(z).quantized, own(z).quantized)
    # The two add their squares in an order of their own.
    torch.testing.assert_close(shared(z).loss, own(z).loss)
    shared(z).loss.backward()
    own(z).loss.backward()
    torch.testing.assert_close(shared.codebook.grad, own.codebook.grad.sum(0, keepdim=True))


@each_backend
def test_fixed_codes_are_a_buffer(backend: str) -> None:
    quantizer = quantizer_on(backend, 3, 4, learnable=False)
    assert not quantizer.learnable
    assert list(quantizer.parameters()) == []
    assert [name for name, _ in quantizer.named_buffers()] == ["codebook"]
    z = torch.randn(5, 3, device=device_of(backend), requires_grad=True)
    output = quantizer(z)
    (output.quantized.sum() + output.loss).backward()
    assert z.grad is not None
    assert quantizer.codebook.grad is None


def saved_and_loaded(value: object, **options: bool) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, **options)


def with_random_codes(quantizer: FusedLatentQuantizer) -> FusedLatentQuantizer:
    with torch.no_grad():
        quantizer.codebook.copy_(torch.randn(quantizer.codebook.shape, generator=torch.Generator().manual_seed(0)))
    return quantizer


@each_backend
@pytest.mark.parametrize("learnable", [True, False])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("assign", [True, False])
def test_state_dict_round_trip(backend: str, learnable: bool, shared: bool, assign: bool) -> None:
    options = {"learnable": learnable, "shared_codebook": shared}
    source, target = (quantizer_on(backend, 3, 4, **options) for _ in range(2))
    with_random_codes(source)
    state = source.state_dict()
    assert list(state) == ["codebook", "_extra_state"]
    assert state["_extra_state"].tolist() == [4, 4, 4]
    target.load_state_dict(saved_and_loaded(state, weights_only=True), strict=True, assign=assign)
    assert torch.equal(source.codebook, target.codebook)
    assert isinstance(target.codebook, nn.Parameter) == learnable
    z = torch.randn(20, 3, device=device_of(backend))
    assert torch.equal(source(z).quantized, target(z).quantized)


def test_state_goes_through_safetensors() -> None:
    source, target = with_random_codes(FusedLatentQuantizer(3, [4, 2, 3])), FusedLatentQuantizer(3, [4, 2, 3])
    target.load_state_dict(safetensors.torch.load(safetensors.torch.save(source.state_dict())))
    assert torch.equal(source.codebook, target.codebook)


def test_a_state_moves_between_learned_and_fixed_codes() -> None:
    source, target = with_random_codes(FusedLatentQuantizer(3, 4)), FusedLatentQuantizer(3, 4, learnable=False)
    target.load_state_dict(source.state_dict())
    assert torch.equal(source.codebook, target.codebook)
    assert list(target.parameters()) == []


def test_a_state_without_levels_loads_by_its_shape() -> None:
    codebook = torch.randn(2, 10)
    for strict in (True, False):
        quantizer = FusedLatentQuantizer(2, [10, 4])
        assert quantizer.load_state_dict({"codebook": codebook}, strict=strict) == ([], [])
        assert torch.equal(quantizer.codebook, codebook)
    with pytest.raises(RuntimeError, match=r"\(2, 10\).*\(3, 10\).*num_latents=3, levels=10"):
        FusedLatentQuantizer(3).load_state_dict({"codebook": codebook})
    with pytest.raises(RuntimeError, match=r"Missing key.*codebook"):
        FusedLatentQuantizer(3).load_state_dict({})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*more"):
        FusedLatentQuantizer(2).load_state_dict({"codebook": codebook, "more": codebook})


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("saved", "built", "named"),
    [
        ({"num_latents": 4}, {"num_latents": 3}, ["(4, 10)", "(3, 10)", "num_latents=4", "num_latents=3"]),
        ({"levels": 8}, {"levels": 10}, ["(2, 8)", "(2, 10)", "levels=8", "levels=10"]),
        ({"levels": [10, 4]}, {"levels": [10, 5]}, ["levels=[10, 4]", "levels=[10, 5]"]),
        ({"levels": 10}, {"levels": [10, 5]}, ["levels=10", "levels=[10, 5]"]),
        ({"levels": [10, 4]}, {"levels": 10}, ["levels=[10, 4]", "levels=10"]),
        ({"shared_codebook": True}, {}, ["(1, 10)", "(2, 10)", "shared_codebook=False"]),
        (
            {"shared_codebook": True},
            {"shared_codebook": True, "num_latents": 3},
            ["num_latents=2", "num_latents=3", "shared_codebook=True"],
        ),
    ],
    ids=str,
)
def test_a_state_of_other_levels_is_refused_in_one_message(saved, built, named, strict: bool) -> None:
    source = with_random_codes(FusedLatentQuantizer(**({"num_latents": 2} | saved)))
    target = nn.Sequential(FusedLatentQuantizer(**({"num_latents": 2} | built)))
    before = target[0].codebook.detach().clone()
    state = {f"0.{name}": value for name, value in source.state_dict().items()}
    with pytest.raises(RuntimeError) as caught:
        target.load_state_dict(state, strict=strict)
    text = str(caught.value)
    for part in ["0.codebook", "Build it with", *named]:
        assert part in text
    # The line that names the module, and ours.
    assert len(text.splitlines()) == 2
    assert torch.equal(target[0].codebook, before)


def test_a_state_loads_into_a_quantizer_without_memory() -> None:
    source = with_random_codes(FusedLatentQuantizer(3, [4, 2, 3]))
    target = FusedLatentQuantizer(3, [4, 2, 3], device="meta")
    target.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(target.codebook, source.codebook)
    assert isinstance(target.codebook, nn.Parameter)
    with pytest.raises(RuntimeError, match=r"levels=\[4, 2, 3\].*levels=\[4, 3, 3\]"):
        FusedLatentQuantizer(3, [4, 3, 3], device="meta").load_state_dict(source.state_dict(), assign=True)


@each_backend
@pytest.mark.parametrize("learnable", [True, False])
def test_copies_are_equal_and_independent(backend: str, learnable: bool) -> None:
    quantizer = quantizer_on(backend, 3, [2, 5, 4], learnable=learnable, index_dtype=torch.int16, channel_dim=-1)
    z = torch.randn(20, 3, device=device_of(backend))
    want = quantizer(z)
    twins = (
        copy.deepcopy(quantizer),
        pickle.loads(pickle.dumps(quantizer)),
        saved_and_loaded(quantizer, weights_only=False),
    )
    for twin in twins:
        assert twin.learnable == learnable
        for got, expected in zip(twin(z), want, strict=True):
            assert torch.equal(got, expected)
        with torch.no_grad():
            twin.codebook.add_(1)
    assert torch.equal(quantizer(z).quantized, want.quantized)


@each_backend
@pytest.mark.parametrize("learnable", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_moves_between_dtypes(backend: str, learnable: bool, dtype: torch.dtype) -> None:
    quantizer = quantizer_on(backend, 3, 4, learnable=learnable)
    before = quantizer.codebook.detach().clone()
    quantizer.to(dtype)
    assert quantizer.codebook.dtype is dtype
    assert torch.equal(quantizer.codebook.detach(), before.to(dtype))
    output = quantizer(torch.randn(5, 3, dtype=dtype, device=device_of(backend)))
    assert output.quantized.dtype is dtype
    assert set(output.quantized.flatten().tolist()) <= set(quantizer.codebook.flatten().tolist())
    assert FusedLatentQuantizer(3, 4, dtype=dtype, learnable=learnable).codebook.dtype is dtype


@pytest.mark.parametrize("learnable", [True, False])
def test_is_made_on_a_device_and_filled_later(learnable: bool) -> None:
    options = {"levels": [4, 2, 3], "learnable": learnable}
    with torch.device("meta"):
        quantizer = FusedLatentQuantizer(3, **options)
    assert quantizer.codebook.is_meta
    quantizer.to_empty(device="cpu")
    quantizer.reset_parameters()
    assert torch.equal(quantizer.codebook, FusedLatentQuantizer(3, **options).codebook)
    assert quantizer.codebook.requires_grad == learnable
    quantizer.to("meta")
    assert quantizer.codebook.is_meta


def test_is_made_without_initialization() -> None:
    quantizer = nn.utils.skip_init(FusedLatentQuantizer, 3, 4)
    quantizer.reset_parameters()
    assert torch.equal(quantizer.codebook, FusedLatentQuantizer(3, 4).codebook)


class Doubled(nn.Module):
    """A codebook of twice what is stored."""

    def forward(self, stored: Tensor) -> Tensor:
        return 2 * stored

    def right_inverse(self, codes: Tensor) -> Tensor:
        return codes / 2


@each_backend
def test_a_parametrized_codebook_serves_learns_and_is_set(backend: str) -> None:
    device = device_of(backend)
    quantizer = quantizer_on(backend, 1, 2)
    nn.utils.parametrize.register_parametrization(quantizer, "codebook", Doubled())
    stored = quantizer.parametrizations.codebook.original
    assert stored.tolist() == [[-0.25, 0.25]]
    assert quantizer.learnable
    z = torch.tensor([[0.7], [-0.4]], device=device)
    assert quantizer(z).quantized.tolist() == [[0.5], [-0.5]]
    quantizer.decode(torch.tensor([[1]], device=device)).backward()
    assert stored.grad.tolist() == [[0.0, 2.0]]
    # The quarter and the three-quarter quantile of 0 to 4.
    quantizer.initialize_from(torch.arange(5.0, device=device).unsqueeze(1))
    assert stored.tolist() == [[0.5, 1.5]]
    quantizer.reset_parameters()
    assert stored.tolist() == [[-0.25, 0.25]]
    assert quantizer.revive_dead_codes(torch.tensor([[9.0]], device=device)) == 1
    assert stored.tolist() == [[4.5, 0.25]]


def test_a_state_of_a_parametrized_codebook_of_other_levels_names_the_levels_alone() -> None:
    source, target = FusedLatentQuantizer(3, 5), FusedLatentQuantizer(3, 6)
    for quantizer in (source, target):
        nn.utils.parametrize.register_parametrization(quantizer, "codebook", Doubled())
    with pytest.raises(RuntimeError) as caught:
        target.load_state_dict(source.state_dict())
    assert "the state to load is of num_latents=3, levels=5; this quantizer is of shape (3, 6)" in str(caught.value)
    target = copy.deepcopy(source)
    with torch.no_grad():
        target.parametrizations.codebook.original.zero_()
    target.load_state_dict(source.state_dict())
    assert torch.equal(target.codebook, source.codebook)


def test_reset_parameters_starts_again() -> None:
    quantizer = FusedLatentQuantizer(3, [4, 2, 3])
    before = quantizer.codebook.detach().clone()
    with torch.no_grad():
        quantizer.codebook.normal_()
    quantizer.reset_parameters()
    assert torch.equal(quantizer.codebook.detach(), before)
    assert quantizer.codebook.requires_grad


def test_repr_tells_quantizers_apart() -> None:
    text = repr(FusedLatentQuantizer(3, [4, 5, 6], channel_dim=-1, learnable=False, commitment_weight=0.25))
    for part in ("FusedLatentQuantizer(3", "levels=[4, 5, 6]", "channel_dim=-1", "learnable=False", "0.25", "'auto'"):
        assert part in text
    text = repr(FusedLatentQuantizer(2, 7, shared_codebook=True, backend="reference"))
    for part in ("levels=7", "shared_codebook=True", "'reference'"):
        assert part in text
    text = repr(FusedLatentQuantizer(2, 7, init_range=(-1, 2), index_dtype=torch.uint8))
    for part in ("init_range=(-1.0, 2.0)", "index_dtype=torch.uint8"):
        assert part in text


@each_backend
@pytest.mark.parametrize("shape", [(40, 3), (4, 3, 5, 2)])
def test_encode_then_decode_is_quantized(backend: str, shape: tuple[int, ...]) -> None:
    quantizer = quantizer_on(backend, 3, [4, 9, 2], index_dtype=torch.uint8)
    z = torch.randn(shape, device=device_of(backend), requires_grad=True)
    output = quantizer(z)
    indices = quantizer.encode(z)
    assert indices.dtype is torch.uint8
    assert torch.equal(indices, output.indices)
    assert torch.equal(quantizer.unpack(quantizer.pack(indices)), indices)
    for dtype in (torch.uint8, torch.int16, torch.int32, torch.int64):
        assert torch.equal(quantizer.decode(indices.to(dtype)), output.quantized)


@each_backend
def test_encode_then_decode_holds_after_the_codes_have_moved(backend: str) -> None:
    quantizer = quantizer_on(backend, 3, 6)
    with torch.no_grad():
        # Neither in order nor in the initial range.
        quantizer.codebook.copy_(100 * torch.randn(3, 6, generator=torch.Generator().manual_seed(0)))
    values = quantizer.codebook.detach()[:, torch.arange(6)].T.contiguous()
    assert quantizer.encode(values).tolist() == [[k] * 3 for k in range(6)]
    assert torch.equal(quantizer.decode(quantizer.encode(values)), values)


def test_decode_is_differentiable_in_the_codebook() -> None:
    quantizer = FusedLatentQuantizer(2, 3, channel_dim=-1)
    indices = torch.tensor([[0, 2], [0, 1], [2, 2]])
    weight = torch.tensor([[1.0, 10.0], [2.0, 20.0], [4.0, 40.0]])
    (quantizer.decode(indices) * weight).sum().backward()
    assert quantizer.codebook.grad.tolist() == [[3.0, 0.0, 4.0], [0.0, 20.0, 50.0]]


@pytest.mark.parametrize("bad", [-1, 3])
def test_decode_refuses_an_index_without_a_code(bad: int) -> None:
    quantizer = FusedLatentQuantizer(2, [3, 5])
    with pytest.raises(ValueError, match=r"levels.*\[3, 5\]"):
        quantizer.decode(torch.tensor([[bad, 0]]))
    assert quantizer.decode(torch.tensor([[2, 4]])).shape == (1, 2)


@pytest.mark.parametrize("method", ["decode", "pack", "usage", "forward", "encode"])
@pytest.mark.parametrize("shared", [False, True])
def test_a_wrong_number_of_latents_is_an_error(method: str, shared: bool) -> None:
    quantizer = FusedLatentQuantizer(3, 4, shared_codebook=shared)
    value = torch.zeros(5, 2) if method in ("forward", "encode") else torch.zeros(5, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"\(5, 2\)") as caught:
        getattr(quantizer, method)(value)
    assert "3" in str(caught.value)
    with pytest.raises(ValueError, match=r"\(3,\)"):
        getattr(quantizer, method)(value[0, :1].expand(3))


def test_latents_in_the_last_dimension_are_told_of_channel_dim() -> None:
    for shared in (False, True):
        quantizer = FusedLatentQuantizer(12, shared_codebook=shared)
        with pytest.raises(ValueError, match=r"12 latents at dimension 1.*\(2, 196, 12\).*channel_dim=-1"):
            quantizer(torch.zeros(2, 196, 12))
    with pytest.raises(ValueError, match=r"12 latents at dimension -1 \(channel_dim\); got shape \(2, 12, 4\)$"):
        FusedLatentQuantizer(12, channel_dim=-1)(torch.zeros(2, 12, 4))


@pytest.mark.parametrize("given", [[[0, 1]], np.array([[0, 1]]), torch.zeros(1, 2), torch.zeros(1, 2).bool()], ids=repr)
@pytest.mark.parametrize("method", ["decode", "pack", "unpack", "usage"])
def test_what_is_no_tensor_of_integers_is_refused(method: str, given: object) -> None:
    kind = str(given.dtype) if isinstance(given, Tensor) else type(given).__name__
    with pytest.raises(TypeError, match=rf"uint8, int16, int32 or int64; got {kind}"):
        getattr(FusedLatentQuantizer(2, 3), method)(given)


@pytest.mark.parametrize("method", ["forward", "encode"])
def test_latents_that_are_no_tensor_are_refused(method: str) -> None:
    with pytest.raises(TypeError, match=r"z must be a torch.Tensor; got list"):
        getattr(FusedLatentQuantizer(2, 3), method)([[0.0, 1.0]])


def test_a_quantizer_of_one_latent_refuses_more() -> None:
    with pytest.raises(ValueError, match=r"1 latents.*\(5, 2\)"):
        FusedLatentQuantizer(1, 4)(torch.zeros(5, 2))


def test_sample_is_uniform_over_the_codes_of_each_latent() -> None:
    levels, n = (3, 10, 1), 20_000
    quantizer = FusedLatentQuantizer(3, levels)
    values = quantizer.sample(n, generator=torch.Generator().manual_seed(0))
    assert values.shape == (n, 3)
    for latent, count in enumerate(levels):
        codes = quantizer.codebook[latent, :count]
        hits = (values[:, latent].unsqueeze(1) == codes).sum(0)
        assert hits.sum() == n
        # Five standard deviations of a binomial count, for draws that the seed fixes.
        deviation = math.sqrt(n / count * (1 - 1 / count))
        assert ((hits - n / count).abs() <= 5 * deviation).all()
    # Latents are independent: no cell of the joint counts of the first two is far from n / 30.
    joint = torch.bincount(quantizer.encode(values).long() @ torch.tensor([10, 1, 0]), minlength=30)
    assert ((joint - n / 30).abs() <= 5 * math.sqrt(n / 30)).all()


def test_sample_repeats_with_its_generator() -> None:
    quantizer = FusedLatentQuantizer(4, 10)
    one, other = (quantizer.sample(50, generator=torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(one, other)
    torch.manual_seed(3)
    first = quantizer.sample(50)
    torch.manual_seed(3)
    assert torch.equal(first, quantizer.sample(50))
    assert not torch.equal(first, quantizer.sample(50))
    assert quantizer.sample(0).shape == (0, 4)


def test_sample_is_differentiable_in_the_codebook() -> None:
    for shared in (False, True):
        quantizer = FusedLatentQuantizer(4, 5, shared_codebook=shared)
        values = quantizer.sample(100, generator=torch.Generator().manual_seed(0))
        values.sum().backward()
        counts = torch.stack([(values.detach() == code).sum(0) for code in torch.linspace(-0.5, 0.5, 5)], 1).float()
        assert torch.equal(quantizer.codebook.grad, counts.sum(0, keepdim=True) if shared else counts)


class Sample(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.quantizer = FusedLatentQuantizer(3, [4, 2, 1])

    def forward(self, x: Tensor) -> Tensor:
        return self.quantizer.sample(x.size(0))


def test_a_traced_sample_takes_a_dynamic_number() -> None:
    module = Sample()
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    dynamic = ({0: torch.export.Dim("batch")},)
    exported = torch.export.export(module, (torch.zeros(7, 1),), dynamic_shapes=dynamic).module()
    for call in (compiled, exported):
        for n in (5, 300):
            values = call(torch.zeros(n, 1)).detach()
            assert values.shape == (n, 3)
            for latent, count in enumerate((4, 2, 1)):
                codes = set(module.quantizer.codebook[latent, :count].tolist())
                # The rarest of 4 codes is missing in 300 draws with a probability of 4 * 0.75**300.
                assert set(values[:, latent].tolist()) <= codes
                assert n < 300 or set(values[:, latent].tolist()) == codes


# Each method with an argument for a quantizer of levels [5, 4, 3], and a batch of two of them.
METHODS = {
    "decode": torch.tensor([[[4, 3, 2], [0, 0, 0]], [[1, 2, 1], [3, 0, 2]]]),
    "pack": torch.tensor([[[4, 3, 2], [0, 0, 0]], [[1, 2, 1], [3, 0, 2]]], dtype=torch.int32),
    "unpack": torch.tensor([[59, 0], [7, 31]]),
}


def method_of(quantizer: FusedLatentQuantizer, name: str) -> Callable[[Tensor], Tensor]:
    return getattr(quantizer, name)


@pytest.mark.parametrize("name", METHODS)
def test_indices_may_be_vmapped(name: str) -> None:
    method = method_of(FusedLatentQuantizer(3, [5, 4, 3]), name)
    got = torch.vmap(method)(METHODS[name])
    assert torch.equal(got, torch.stack([method(each) for each in METHODS[name]]))


def test_codebooks_may_be_vmapped_over_indices() -> None:
    quantizer = FusedLatentQuantizer(2, 3)
    codebooks = torch.arange(12.0).view(2, 2, 3)

    def decode(codebook: Tensor) -> Tensor:
        return torch.func.functional_call(Decode(quantizer), {"quantizer.codebook": codebook}, torch.tensor([[2, 0]]))

    assert torch.vmap(decode)(codebooks).tolist() == [[[2.0, 3.0]], [[8.0, 9.0]]]


class Decode(nn.Module):
    def __init__(self, quantizer: FusedLatentQuantizer) -> None:
        super().__init__()
        self.quantizer = quantizer

    def forward(self, indices: Tensor) -> Tensor:
        return self.quantizer.decode(indices)


@pytest.mark.parametrize("name", METHODS)
def test_methods_have_shapes_without_memory(name: str) -> None:
    argument = METHODS[name][0]
    want = method_of(FusedLatentQuantizer(3, [5, 4, 3]), name)(argument)
    got = method_of(FusedLatentQuantizer(3, [5, 4, 3], device="meta"), name)(argument.to("meta"))
    assert got.is_meta
    with FakeTensorMode() as mode:
        fake = method_of(FusedLatentQuantizer(3, [5, 4, 3]), name)(mode.from_tensor(argument))
    for other in (got, fake):
        assert (other.shape, other.dtype) == (want.shape, want.dtype)
    # Nothing of the fakes was kept.
    assert torch.equal(method_of(FusedLatentQuantizer(3, [5, 4, 3]), name)(argument), want)


def test_what_inference_mode_made_serves_outside_of_it() -> None:
    quantizer = FusedLatentQuantizer(2, [7, 11])
    with torch.inference_mode():
        codes = quantizer.pack(torch.tensor([[6, 10], [1, 2]]))
    assert quantizer.unpack(codes).tolist() == [[6, 10], [1, 2]]
    quantizer.decode(quantizer.unpack(codes.clone())).sum().backward()
    assert quantizer.codebook.grad.sum() == 4


def test_pack_is_a_mixed_radix_number_with_the_first_latent_lowest() -> None:
    quantizer = FusedLatentQuantizer(3, [2, 3, 4])
    indices = torch.tensor([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 2, 3]], dtype=torch.int32)
    codes = quantizer.pack(indices)
    assert codes.dtype is torch.int64
    assert codes.tolist() == [0, 1, 2, 6, 23]
    assert torch.equal(
        quantizer.unpack(torch.arange(24)).T,
        torch.stack((torch.arange(24) % 2, torch.arange(24) // 2 % 3, torch.arange(24) // 6)).to(torch.int32),
    )


@examples
@given(
    levels=st.lists(st.integers(1, 300), min_size=1, max_size=7),
    rest=st.lists(st.integers(0, 4), max_size=3),
    data=st.data(),
)
def test_unpack_inverts_pack(levels: list[int], rest: list[int], data: st.DataObject) -> None:
    position = data.draw(st.integers(0, len(rest)))
    channel_dim = data.draw(st.sampled_from([position, position - len(rest) - 1]))
    quantizer = FusedLatentQuantizer(len(levels), levels, channel_dim=channel_dim, index_dtype=torch.int16)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    uniform = torch.rand([*rest, len(levels)], generator=generator)
    indices = (uniform * torch.tensor(levels)).long().clamp(max=torch.tensor(levels) - 1).to(torch.int16)
    indices = indices.movedim(-1, position)
    codes = quantizer.pack(indices)
    assert codes.shape == tuple(rest)
    assert ((codes >= 0) & (codes < math.prod(levels))).all()
    assert torch.equal(quantizer.unpack(codes), indices)
    most = torch.tensor([math.prod(levels) - 1])
    flat = FusedLatentQuantizer(len(levels), levels, channel_dim=-1)
    assert flat.unpack(most).tolist() == [[level - 1 for level in levels]]
    assert torch.equal(flat.pack(flat.unpack(most)), most)


def test_pack_reaches_to_the_last_int64() -> None:
    # 2**63 - 1 = 7 * 7 * 73 * 127 * 337 * 92737 * 649657
    levels = [49 * 73, 127 * 337, 92737, 649657]
    assert math.prod(levels) == 2**63 - 1
    quantizer = FusedLatentQuantizer(4, levels)
    last = torch.tensor([[level - 1 for level in levels]])
    assert quantizer.pack(last).tolist() == [2**63 - 2]
    assert torch.equal(quantizer.unpack(quantizer.pack(last)).long(), last)
    with pytest.raises(ValueError, match="codes"):
        quantizer.unpack(torch.tensor([2**63 - 1]))


def test_pack_refuses_products_that_int64_cannot_hold() -> None:
    quantizer = FusedLatentQuantizer(63, 2)
    for call in (
        lambda: quantizer.pack(torch.zeros(1, 63, dtype=torch.int64)),
        lambda: quantizer.unpack(torch.zeros(1, dtype=torch.int64)),
    ):
        with pytest.raises(ValueError, match=rf"{2**63}.*2\*\*63 - 1"):
            call()
    # The paper's codebook fits, and quantizing itself has no such limit.
    FusedLatentQuantizer(12, 10).pack(torch.zeros(1, 12, dtype=torch.int64))
    quantizer(torch.zeros(2, 63))


@pytest.mark.parametrize("bad", [-1, 24])
def test_unpack_refuses_numbers_beyond_the_last_code(bad: int) -> None:
    with pytest.raises(ValueError, match=r"0\.\.23"):
        FusedLatentQuantizer(3, [2, 3, 4]).unpack(torch.tensor([0, bad]))


@each_backend
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_codes_move_to_the_centres_of_clusters(backend: str, optimizer: type[torch.optim.Optimizer]) -> None:
    centres = torch.tensor([[-0.8, 0.1, 0.7], [-0.3, 0.0, 0.9]])
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (600, 2), generator=generator)
    z = centres.gather(1, labels.T).T + 0.01 * torch.randn(600, 2, generator=generator)
    means = torch.stack([torch.stack([z[labels[:, d] == k, d].mean() for k in range(3)]) for d in range(2)])
    quantizer = quantizer_on(backend, 2, 3, quantization_weight=1.0, init_range=(-0.5, 0.5))
    z = z.to(device_of(backend))
    assert torch.equal(quantizer.encode(z).long().cpu(), labels)
    # About 200 of 1200 elements belong to a code: a step of 6 halves the distance at SGD.
    steps, rate = (60, 1.5) if optimizer is torch.optim.SGD else (400, 0.02)
    learner = optimizer(quantizer.parameters(), lr=rate)
    for _ in range(steps):
        learner.zero_grad()
        quantizer(z).loss.backward()
        learner.step()
    torch.testing.assert_close(quantizer.codebook.detach().cpu(), means, rtol=0, atol=1e-3)


@each_backend
def test_the_loss_trains_an_encoder_towards_its_codes(backend: str) -> None:
    quantizer = quantizer_on(backend, 2, 3, commitment_weight=1.0, learnable=False)
    z = torch.tensor([[-0.3, 0.2], [0.4, -0.1]], device=device_of(backend), requires_grad=True)
    want = quantizer(z).quantized.detach()
    for _ in range(40):
        (grad,) = torch.autograd.grad(quantizer(z).loss, z)
        z = (z - 0.5 * grad).detach().requires_grad_()
    # With M = 4 each step takes a quarter of the way: 0.75**40 of at most 0.2 is left.
    torch.testing.assert_close(z.detach(), want, rtol=0, atol=0.2 * 0.75**40 + 1e-6)


@pytest.mark.parametrize(
    ("arguments", "error", "named"),
    [
        ({"num_latents": 0}, ValueError, ["num_latents", "0"]),
        ({"num_latents": -2}, ValueError, ["num_latents", "-2"]),
        ({"levels": 0}, ValueError, ["levels", "0"]),
        ({"levels": [3, 0, 2]}, ValueError, ["levels", "[3, 0, 2]"]),
        ({"levels": [3, 2]}, ValueError, ["levels", "[3, 2]", "num_latents=3"]),
        ({"levels": []}, ValueError, ["levels", "[]"]),
        ({"levels": [3, 2, 3], "shared_codebook": True}, ValueError, ["shared", "[3, 2, 3]"]),
        ({"init_range": (0.5, -0.5)}, ValueError, ["init_range", "(0.5, -0.5)"]),
        ({"init_range": (0.0, math.inf)}, ValueError, ["init_range", "inf"]),
        ({"init_range": (0.0, 1.0, 2.0)}, ValueError, ["init_range", "(0.0, 1.0, 2.0)"]),
        ({"levels": 257, "index_dtype": torch.uint8}, ValueError, ["uint8", "255", "257"]),
        ({"levels": [2, 40_000, 2], "index_dtype": torch.int16}, ValueError, ["int16", "32767", "40000"]),
        ({"quantization_weight": "0.1"}, TypeError, ["quantization_weight", "'0.1'"]),
        ({"commitment_weight": None}, TypeError, ["commitment_weight", "None"]),
        ({"quantization_weight": math.nan}, ValueError, ["quantization_weight", "nan"]),
        ({"commitment_weight": math.inf}, ValueError, ["commitment_weight", "inf"]),
        ({"commitment_weight": -1}, ValueError, ["commitment_weight", "-1"]),
        ({"index_dtype": torch.float32}, TypeError, ["index_dtype", "float32"]),
        ({"backend": "gpu"}, ValueError, ["backend", "'gpu'", "reference"]),
    ],
    ids=str,
)
def test_construction_errors(arguments: dict[str, object], error: type[Exception], named: list[str]) -> None:
    with pytest.raises(error) as caught:
        FusedLatentQuantizer(**({"num_latents": 3} | arguments))
    for word in named:
        assert word in str(caught.value)


@each_backend
def test_uint8_holds_256_codes(backend: str) -> None:
    quantizer = quantizer_on(backend, 1, 256, index_dtype=torch.uint8)
    assert quantizer.encode(torch.tensor([[9.0]], device=device_of(backend))).item() == 255


class Frozen(nn.Module):
    def __init__(self, backend: str) -> None:
        super().__init__()
        self.quantizer = quantizer_on(backend, 3, 4)

    def forward(self, z: Tensor) -> Tensor:
        return self.quantizer(z).loss


@each_backend
def test_freezing_the_codebook_stops_its_gradient(backend: str) -> None:
    module = Frozen(backend).requires_grad_(False)
    z = torch.randn(5, 3, device=device_of(backend), requires_grad=True)
    module(z).backward()
    assert z.grad is not None
    assert module.quantizer.codebook.grad is None


def test_indices_outside_their_latent_are_refused_everywhere() -> None:
    quantizer = FusedLatentQuantizer(2, levels=[3, 2])
    for indices in (torch.tensor([[3, 0]]), torch.tensor([[0, 2]]), torch.tensor([[-1, 0]])):
        for method in (quantizer.decode, quantizer.pack, quantizer.usage):
            with pytest.raises(ValueError, match=r"0\.\.levels - 1"):
                method(indices)
    for method in (quantizer.decode, quantizer.pack, quantizer.usage):
        with pytest.raises(TypeError, match="float32"):
            method(torch.zeros(1, 2))


def test_levels_may_come_from_numpy() -> None:
    assert FusedLatentQuantizer(2, levels=np.int64(4)).levels == (4, 4)
    assert FusedLatentQuantizer(2, levels=np.array([4, 3]))(torch.zeros(5, 2)).indices.shape == (5, 2)
