"""The contenders of the benchmarks of `latent_quantize`, and the floors under them, behind one interface."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from latent_quantize_cases import COMMITMENT_WEIGHT, QUANTIZATION_WEIGHT, Case, Direction, Inputs, Results
from measurement import Task
from torch import Tensor

from qlae_kernels import backends, latent_quantize

# Combinations of codes up to which vector-quantize-pytorch holds one codebook per latent: it lists them all.
MAX_LISTED_CODES = 1 << 20


def plain_latent_quantize(
    z: Tensor, codebook: Tensor, quantization_weight: float = 0.01, commitment_weight: float = 0.01
) -> tuple[Tensor, Tensor, Tensor]:
    """The plain PyTorch lines that `latent_quantize` is equal to, for z [N, D] and codebook [D, K] of finite values.

    Returns quantized [N, D] of z's dtype, indices [N, D] int64, and the loss. Its distances take N * D * K values.
    """
    latents = z.to(codebook.dtype)
    indices = (latents.unsqueeze(-1) - codebook).abs().argmin(-1)
    first_of_latent = codebook.size(1) * torch.arange(codebook.size(0), device=z.device)
    codes = codebook.flatten()[first_of_latent + indices]
    quantization_loss = F.mse_loss(codes, latents.detach())
    commitment_loss = F.mse_loss(latents, codes.detach())
    loss = quantization_weight * quantization_loss + commitment_weight * commitment_loss
    quantized = (latents + (codes - latents).detach()).to(z.dtype)
    return quantized, indices, loss


class Contender(Protocol):
    """One way to do the work. `inputs` are those that it was built for, `note` says how its work differs."""

    inputs: Inputs
    note: str | None

    def task(self, direction: Direction) -> Task:
        """The call to time."""

    def results(self) -> Results:
        """The results of one forward and backward pass."""

    def release(self) -> None:
        """Forget the results of earlier calls."""


class TorchContender:
    """A function of z and codebook that returns (quantized, indices, loss); loss may be None."""

    note: str | None = None

    def __init__(self, inputs: Inputs, function: Callable[[Tensor, Tensor], tuple[Any, ...]]) -> None:
        self.inputs = inputs
        self.function = function
        self.z = inputs.z.clone().requires_grad_()
        self.codebook = inputs.codebook.clone().requires_grad_()
        self.grad_quantized = inputs.grad_quantized

    def task(self, direction: Direction) -> Task:
        if direction == "forward":
            return Task(self.forward_without_graph)
        if direction == "backward":
            return Task(self.backward, self.forward)
        return Task(self.forward_backward)

    def forward(self) -> tuple[Any, ...]:
        return self.function(self.z, self.codebook)

    @torch.no_grad()
    def forward_without_graph(self) -> tuple[Any, ...]:
        return self.function(self.z, self.codebook)

    def backward(self, outputs: tuple[Any, ...]) -> None:
        self.z.grad = None
        self.codebook.grad = None
        quantized, _, loss = outputs
        if loss is None:
            quantized.backward(self.grad_quantized)
        else:
            torch.autograd.backward((quantized, loss), (self.grad_quantized, None))

    def forward_backward(self) -> None:
        self.backward(self.function(self.z, self.codebook))

    def results(self) -> Results:
        quantized, indices, loss = outputs = self.forward()
        self.backward(outputs)
        return Results(quantized.detach(), indices, loss.detach(), self.z.grad, self.codebook.grad)

    def release(self) -> None:
        self.z.grad = None
        self.codebook.grad = None


class VectorQuantizePytorch(TorchContender):
    """vector-quantize-pytorch's `LatentQuantize`, with the case's codes as its values.

    It lists all combinations of codes when it is built, so many latents can only share one codebook (its
    `num_codebooks`); with 12 latents of 10 codes the list would take 8 TB. Its codebook receives no gradient, that of
    z does not follow the paper's losses, and its indices count combinations: `results` leaves these out.
    """

    def __init__(self, inputs: Inputs) -> None:
        from vector_quantize_pytorch import LatentQuantize

        num_latents, levels = inputs.codebook.shape
        shared = levels**num_latents > MAX_LISTED_CODES
        if shared:
            self.note = (
                "one codebook shared by all latents; with one per latent it lists all combinations of codes, "
                "8 TB for 12 latents of 10"
            )
            codebook = inputs.codebook[:1].expand_as(inputs.codebook)
            inputs = Inputs(inputs.z, codebook, inputs.grad_quantized)
        module = LatentQuantize(
            levels=[levels] if shared else [levels] * num_latents,
            dim=num_latents,
            num_codebooks=num_latents if shared else 1,
            quantization_loss_weight=QUANTIZATION_WEIGHT,
            commitment_loss_weight=COMMITMENT_WEIGHT,
        ).to(inputs.z.device)
        with torch.no_grad():
            for values, codes in zip(module.values_per_latent, inputs.codebook, strict=False):
                values.copy_(codes)
        super().__init__(inputs, lambda z, _: module(z))

    def results(self) -> Results:
        quantized, _, loss = self.forward()
        return Results(quantized.detach(), None, loss.detach(), None, None)


class ThreeCopies:
    """A floor for large sizes: three times `copy_` of z, as many bytes as forward and backward must move in float32."""

    note: str | None = None

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self.copies = [torch.empty_like(inputs.z) for _ in range(3)]
        self.copy()

    def task(self, direction: Direction) -> Task:
        return Task(self.copy)

    def copy(self) -> None:
        for copy in self.copies:
            copy.copy_(self.inputs.z)


def _jax(inputs: Inputs) -> Contender:
    from latent_quantize_jax import JaxContender

    return JaxContender(inputs)


def _compiled(inputs: Inputs) -> Contender:
    # A compiled function keeps at most eight shapes; each contender starts anew.
    torch.compiler.reset()
    return TorchContender(inputs, torch.compile(plain_latent_quantize, dynamic=False, fullgraph=True))


CONTENDERS: dict[str, Callable[[Inputs], Contender]] = {
    "fused": lambda inputs: TorchContender(inputs, latent_quantize),
    "eager": lambda inputs: TorchContender(inputs, plain_latent_quantize),
    "torch.compile": _compiled,
    "JAX": _jax,
    "vector-quantize-pytorch": VectorQuantizePytorch,
}

# Autograd's own cost for one output, and for the two outputs that the op has; the traffic of the op.
FLOORS: dict[str, Callable[[Inputs], Any]] = {
    "trivial op": lambda inputs: TorchContender(inputs, lambda z, codebook: (z * 1, None, None)),
    "trivial pair": lambda inputs: TorchContender(inputs, lambda z, codebook: (z * 1, None, codebook.sum())),
    "three copies": ThreeCopies,
}


def unavailable_reason(name: str, case: Case, device: torch.device) -> str | None:
    """Why the contender cannot do this case here, with the remedy where there is one; None if it can."""
    if name == "fused" and backends.select_backend("auto", device.type) is backends.BACKENDS["reference"]:
        chosen = f"the reference backend serves {device.type} here: no other can, or QLAE_BACKEND asks for it"
        return backends.unavailable_reason("cpu") or chosen
    if name == "torch.compile":
        return _compile_failure(device.type)
    if name == "JAX" and device.type != "cpu":
        return f"needs the CPU, where alone it is compared; here is {device.type}"
    if name == "vector-quantize-pytorch" and case.dtype is not torch.float32:
        return "needs float32, which it returns whatever the input's dtype"
    module = {"JAX": "jax", "vector-quantize-pytorch": "vector_quantize_pytorch"}.get(name)
    if module is not None and importlib.util.find_spec(module) is None:
        return f"{module} is not installed; the extra `bench` brings it: pip install '.[bench]'"
    return None


@lru_cache
def _compile_failure(device_type: str) -> str | None:
    if device_type == "cpu" and not any(map(shutil.which, ("g++", "clang++", "cl"))):
        return "torch.compile needs a C++ compiler; install g++ or clang++"
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(1, device=device_type))
    except Exception as error:  # the compiler's errors have no common type; the reason is shown
        return f"torch.compile does not work here: {str(error).strip().splitlines()[0]}"
    return None
