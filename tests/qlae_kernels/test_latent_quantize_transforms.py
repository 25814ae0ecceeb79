"""`latent_quantize` under torch.func and make_fx: what the plain lines of PyTorch give under the same transform."""

from collections.abc import Callable

import pytest
import torch
from backend_variants import each_backend
from latent_quantize_statement import assert_same_bits
from on_device import device_of
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional

from qlae_kernels import FusedLatentQuantizer, latent_quantize

QUANTIZATION, COMMITMENT = 0.75, 0.25
Quantize = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def fused(backend: str, **options: object) -> Quantize:
    def quantize(z: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weights = {"quantization_weight": QUANTIZATION, "commitment_weight": COMMITMENT}
        return latent_quantize(z, codebook, backend=backend, **weights, **options)

    return quantize


def plain(z: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The lines of the README, for z [B, D] and codebook [D, K]."""
    indices = (z.unsqueeze(-1) - codebook).abs().argmin(-1)
    codes = codebook[torch.arange(codebook.size(0), device=z.device), indices]
    loss = QUANTIZATION * functional.mse_loss(codes, z.detach()) + COMMITMENT * functional.mse_loss(z, codes.detach())
    return z + (codes - z).detach(), indices.int(), loss


def objective_of(quantize: Quantize) -> Callable[[Tensor, Tensor], Tensor]:
    def objective(z: Tensor, codebook: Tensor) -> Tensor:
        quantized, _, loss = quantize(z, codebook)
        return quantized.pow(3).sum() + loss

    return objective


def problem(backend: str, *shape: int, levels: int = 5, books: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(*shape, generator=generator, dtype=torch.float64)
    codebook = torch.randn(*books, shape[-1], levels, generator=generator, dtype=torch.float64)
    return z.to(device_of(backend)), codebook.to(device_of(backend))


def assert_close(got: object, want: object) -> None:
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


TRANSFORMS: dict[str, Callable[[Quantize, Tensor, Tensor], object]] = {
    "grad": lambda f, z, v: grad(objective_of(f), argnums=(0, 1))(z, v),
    "vjp": lambda f, z, v: vjp(lambda *a: f(*a)[0::2], z, v)[1]((z.cos(), z.new_tensor(3.0))),
    "jacrev": lambda f, z, v: jacrev(lambda *a: f(*a)[0::2], argnums=(0, 1))(z, v),
    "jvp": lambda f, z, v: jvp(objective_of(f), (z, v), (z.sin(), v.cos())),
    "jvp of z alone": lambda f, z, v: jvp(lambda z: f(z, v)[0::2], (z,), (z.sin(),)),
    "jvp of the codebook alone": lambda f, z, v: jvp(lambda v: f(z, v)[0::2], (v,), (v.cos(),)),
    "jacfwd": lambda f, z, v: jacfwd(lambda *a: f(*a)[0::2], argnums=(0, 1))(z, v),
    "hessian": lambda f, z, v: hessian(objective_of(f), argnums=(0, 1))(z, v),
    "grad of grad": lambda f, z, v: grad(lambda z: grad(objective_of(f))(z, v).square().sum())(z),
    "vmap of a closure": lambda f, z, v: vmap(lambda z: f(z[None], v))(z),
    "vmap over dimension 1": lambda f, z, v: vmap(lambda z: tuple(f(z, v)), in_dims=1, out_dims=(1, 0, 0))(
        torch.stack((z, z + 1, z - 1), 1)
    ),
    "gradients per sample": lambda f, z, v: vmap(
        grad(lambda z, v: objective_of(f)(z[None], v), argnums=(0, 1)), (0, None)
    )(z, v),
    "vmap in vmap": lambda f, z, v: vmap(lambda z: vmap(lambda z: f(z[None], v))(z))(z.expand(3, *z.shape)),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_gives_what_it_gives_of_the_plain_lines(backend: str, name: str) -> None:
    z, codebook = problem(backend, 7, 3)
    assert_close(TRANSFORMS[name](fused(backend), z, codebook), TRANSFORMS[name](plain, z, codebook))


BATCHED = {
    "latents": (0, None),
    "codebooks": (None, 0),
    "both": (0, 0),
    "other dimensions": (2, 1),
    "negative dimensions": (-1, -2),
}


@pytest.mark.parametrize("name", BATCHED)
def test_vmap_over_latents_and_codebooks(backend: str, name: str) -> None:
    in_dims = BATCHED[name]
    z, codebook = problem(backend, 4, 7, 3, books=(4,))
    arguments = [
        value[0] if dim is None else value.movedim(0, dim) for value, dim in zip((z, codebook), in_dims, strict=True)
    ]
    got = vmap(fused(backend), in_dims)(*arguments)
    want = [
        plain(z[i if in_dims[0] is not None else 0], codebook[i if in_dims[1] is not None else 0]) for i in range(4)
    ]
    for one, others in zip(got, zip(*want, strict=True), strict=True):
        assert_close(one, torch.stack(others))
    got = vmap(grad(objective_of(fused(backend)), argnums=(0, 1)), in_dims)(*arguments)
    want = vmap(grad(objective_of(plain), argnums=(0, 1)), in_dims)(*arguments)
    assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("in_dims", [(0, None), (None, 0), (0, 0)], ids=["latents", "codebooks", "both"])
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_vmap_equals_calls_one_by_one(
    backend: str, dtype: torch.dtype, in_dims: tuple[int | None, int | None], shared: bool
) -> None:
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(3, 2, 4, 5, generator=generator).to(device_of(backend), dtype)
    z[1, 0, 2, 3], z[0, 1, 1, 1] = torch.nan, torch.inf
    codebook = torch.randn(3, 1 if shared else 4, 6, generator=generator).to(device_of(backend))
    quantize = fused(backend, channel_dim=1, levels=[5] if shared else [6, 1, 3, 4], index_dtype=torch.int16)
    arguments = [value if dim == 0 else value[0] for value, dim in zip((z, codebook), in_dims, strict=True)]
    got = vmap(quantize, in_dims)(*arguments)
    gradients = vmap(grad(lambda *pair: quantize(*pair)[2], argnums=(0, 1)), in_dims)(*arguments)
    for entry in range(3):
        pair = [value[entry] if dim == 0 else value for value, dim in zip(arguments, in_dims, strict=True)]
        leaves = [value.clone().requires_grad_() for value in pair]
        want = quantize(*leaves)
        assert_same_bits(got[0][entry], want[0])
        assert_same_bits(got[1][entry], want[1])
        torch.testing.assert_close(got[2][entry], want[2], equal_nan=True)
        for one, other in zip(gradients, torch.autograd.grad(want[2], leaves), strict=True):
            torch.testing.assert_close(one[entry], other, equal_nan=True)


@each_backend
def test_indices_may_be_left_out(backend: str) -> None:
    z, codebook = problem(backend, 4, 7, 3)

    def loss_of(z: Tensor) -> Tensor:
        output = fused(backend, return_indices=False)(z, codebook)
        assert output.indices is None
        return output.loss

    assert_close(vmap(grad(loss_of))(z), vmap(grad(lambda z: plain(z, codebook)[2]))(z))


@each_backend
def test_an_ensemble_of_quantizers(backend: str) -> None:
    device = device_of(backend)
    members = [
        FusedLatentQuantizer(3, [4, 2, 4], init_range=(-1.0, high), backend=backend, device=device)
        for high in (0.5, 1.0, 2.0)
    ]
    parameters, buffers = stack_module_state(members)
    template = FusedLatentQuantizer(3, [4, 2, 4], backend=backend, device="meta")
    z = torch.randn(20, 3, device=device)

    def loss_of(
        parameters: dict[str, Tensor], buffers: dict[str, Tensor], z: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        output = functional_call(template, (parameters, buffers), (z,))
        return output.loss, tuple(output[:2])

    got, (quantized, indices) = vmap(grad(loss_of, has_aux=True), in_dims=(0, 0, None))(parameters, buffers, z)
    for number, member in enumerate(members):
        output = member(z)
        output.loss.backward()
        assert_same_bits(quantized[number], output.quantized)
        assert_same_bits(indices[number], output.indices)
        torch.testing.assert_close(got["codebook"][number], member.codebook.grad)


@each_backend
def test_functional_call_takes_another_codebook(backend: str) -> None:
    device = device_of(backend)
    quantizer = FusedLatentQuantizer(3, 5, backend=backend, device=device)
    z, codebook = torch.randn(8, 3, device=device), torch.randn(3, 5, device=device, requires_grad=True)
    got = functional_call(quantizer, {"codebook": codebook}, (z,))
    want = latent_quantize(z, codebook, backend=backend)
    for one, other in zip(got, want, strict=True):
        assert_same_bits(one, other)
    got.loss.backward()
    assert codebook.grad.abs().sum() > 0
    assert quantizer.codebook.grad is None


class Autoencoder(nn.Module):
    """A quantizer between two linear layers; returns the objective."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(4, 3), nn.Linear(3, 4)
        self.quantizer = FusedLatentQuantizer(3, 5, backend=backend)

    def forward(self, x: Tensor) -> Tensor:
        quantized, _, loss = self.quantizer(self.encoder(x))
        return (self.decoder(quantized) - x).square().mean() + loss


@each_backend
def test_gradients_per_sample_of_a_model(backend: str) -> None:
    model = Autoencoder(backend).double().to(device_of(backend))
    x = torch.randn(6, 4, dtype=torch.float64, device=device_of(backend))
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    per_sample = vmap(grad(lambda p, x: functional_call(model, p, (x[None],))), in_dims=(None, 0))(parameters, x)
    for sample in range(6):
        model.zero_grad()
        model(x[sample : sample + 1]).backward()
        for name, value in model.named_parameters():
            assert_close(per_sample[name][sample], value.grad)


@pytest.mark.parametrize("number", [0, 3])
def test_vmap_over_any_number_of_entries(backend: str, number: int) -> None:
    z, codebook = problem(backend, number, 7, 3)
    for quantize in (fused(backend), lambda *pair: tuple(torch.ops.qlae.latent_quantize(*pair, *op_options(backend)))):
        quantized, indices, loss = vmap(quantize, (0, None))(z, codebook)
        assert quantized.shape == indices.shape == z.shape
        assert loss.shape == (number,)
    assert vmap(fused(backend), (None, 0))(z.new_zeros(7, 3), codebook.expand(number, 3, 5))[0].shape == z.shape


def op_options(backend: str) -> tuple[object, ...]:
    return None, 1, QUANTIZATION, COMMITMENT, torch.int32, True, backend


@pytest.mark.parametrize("frozen", [False, True], ids=["learned", "frozen"])
@pytest.mark.parametrize("batched_by", ["is_grads_batched", "vmap"])
def test_many_gradients_at_a_time(backend: str, batched_by: str, frozen: bool) -> None:
    z, codebook = problem(backend, 7, 3)
    z.requires_grad_()
    codebook.requires_grad_(not frozen)
    inputs = (z,) if frozen else (z, codebook)
    grad_quantized, grad_loss = torch.randn(4, 7, 3).to(z), torch.randn(4).to(z)

    def gradients(output: tuple[Tensor, Tensor, Tensor], grads: tuple[Tensor, Tensor], **options: bool) -> tuple:
        return torch.autograd.grad(output[0::2], inputs, grads, retain_graph=True, **options)

    output = fused(backend)(z, codebook)
    if batched_by == "vmap":
        got = vmap(lambda *grads: gradients(output, grads))(grad_quantized, grad_loss)
    else:
        got = gradients(output, (grad_quantized, grad_loss), is_grads_batched=True)
    want = [gradients(plain(z, codebook), grads) for grads in zip(grad_quantized, grad_loss, strict=True)]
    for one, others in zip(got, zip(*want, strict=True), strict=True):
        assert_close(one, torch.stack(others))
    (of_loss,) = torch.autograd.grad(fused(backend)(z, codebook)[2], z, grad_loss, is_grads_batched=True)
    assert_close(of_loss, torch.stack([torch.autograd.grad(each * plain(z, codebook)[2], z)[0] for each in grad_loss]))


@pytest.mark.parametrize("function", ["jacobian", "hessian"])
def test_the_vectorized_functions_of_torch_autograd(backend: str, function: str) -> None:
    z, codebook = problem(backend, 7, 3)
    of = objective_of(fused(backend)) if function == "hessian" else lambda *pair: fused(backend)(*pair)[0::2]
    one_by_one, vectorized = (
        getattr(torch.autograd.functional, function)(of, (z, codebook), vectorize=vectorize)
        for vectorize in (False, True)
    )
    assert_close(vectorized, one_by_one)


def test_wrong_arguments_are_named_under_vmap() -> None:
    with pytest.raises(ValueError, match="channel_dim 2 is out of range"):
        vmap(lambda z: latent_quantize(z, torch.zeros(3, 4), channel_dim=2))(torch.zeros(5, 2, 3))
    with pytest.raises(ValueError, match="codebook must have shape"):
        vmap(lambda z: latent_quantize(z, torch.zeros(4, 4)))(torch.zeros(5, 2, 3))


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@each_backend
def test_make_fx_records_the_op(backend: str, mode: str) -> None:
    z, codebook = problem(backend, 7, 3)
    graph = make_fx(fused(backend), tracing_mode=mode)(z, codebook)
    assert any(node.target is torch.ops.qlae.latent_quantize.default for node in graph.graph.nodes)
    for got, want in zip(graph(z + 1, codebook), fused(backend)(z + 1, codebook), strict=True):
        assert_same_bits(got, want)
    graph = make_fx(grad(objective_of(fused(backend)), argnums=(0, 1)), tracing_mode=mode)(z, codebook)
    assert_close(graph(z + 1, codebook), grad(objective_of(plain), argnums=(0, 1))(z + 1, codebook))


@each_backend
@pytest.mark.parametrize("name", ["grad", "jvp", "gradients per sample", "vmap in vmap"])
def test_a_compiled_transform(backend: str, name: str) -> None:
    torch.compiler.reset()
    z, codebook = problem(backend, 7, 3)
    compiled = torch.compile(lambda z, v: TRANSFORMS[name](fused(backend), z, v), fullgraph=True, backend="aot_eager")
    assert_close(compiled(z, codebook), TRANSFORMS[name](plain, z, codebook))
