"""What every contender of `latent_quantize` must return before it is timed."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from latent_quantize_cases import COMMITMENT_WEIGHT, QUANTIZATION_WEIGHT, Inputs, Results
from latent_quantize_peers import plain_latent_quantize
from torch import Tensor


class Expected(NamedTuple):
    """Values in float64 from the indices of the plain statement, and how far a contender may be from them."""

    values: Results
    tolerances: Results


# Distances that the plain statement may hold at a time where only a part is compared with it.
MAX_DISTANCES = 1 << 28


@lru_cache(maxsize=1)
def expected_results(inputs: Inputs) -> Expected:
    """What the definition gives for `inputs` and a loss with gradient 1."""
    return expected_from(plain_indices(inputs.z, inputs.codebook), inputs)


@torch.no_grad()
def plain_indices(z: Tensor, codebook: Tensor) -> Tensor:
    """The indices of the plain statement, int64 [N, D]."""
    return plain_latent_quantize(z, codebook)[1]


@torch.no_grad()
def expected_from(indices: Tensor, inputs: Inputs) -> Expected:
    """What follows from the indices (int64 [N, D]) for `inputs` and a loss with gradient 1.

    The tolerances follow from the roundings in float32 (unit u) and, at the end, in z's dtype (spacing eps):
    straight-through z + (codes - z) loses at most eps (|z| + |codes|), a gradient of z eight roundings of the loss's
    part and one of the whole, and a sum of n terms 8 sqrt(n) u times the sum of their sizes (Higham and Mary 2019,
    doi 10.1137/18M1226312: exceeded with a probability below 1e-13, whatever the order of the sum).
    """
    z, codebook, grad_quantized = inputs.z.double(), inputs.codebook.double(), inputs.grad_quantized.double()
    unit = torch.finfo(torch.float32).eps / 2
    eps = torch.finfo(inputs.z.dtype).eps
    latents = torch.arange(codebook.size(0), device=codebook.device)
    codes = codebook[latents, indices]
    residual = z - codes
    scale = 2 / z.numel()

    def sums(values: Tensor) -> Tensor:
        position = (indices + codebook.size(1) * latents).flatten()
        return values.new_zeros(codebook.numel()).index_add_(0, position, values.flatten()).view_as(codebook)

    def of_a_sum(count: Tensor | int) -> Tensor:
        return unit * (8 * torch.as_tensor(count, device=z.device, dtype=z.dtype).sqrt() + 8)

    loss = (QUANTIZATION_WEIGHT + COMMITMENT_WEIGHT) * residual.square().mean()
    from_loss = scale * COMMITMENT_WEIGHT * residual
    to_codes = scale * QUANTIZATION_WEIGHT * residual
    values = Results(codes, indices, loss, grad_quantized + from_loss, -sums(to_codes))
    tolerances = Results(
        eps * (z.abs() + codes.abs()),
        torch.zeros_like(indices),
        of_a_sum(z.numel()) * loss,
        8 * unit * from_loss.abs() + eps * (grad_quantized.abs() + from_loss.abs()),
        of_a_sum(sums(torch.ones_like(z))) * sums(to_codes.abs()),
    )
    return Expected(values, tolerances)


def check_agreement(name: str, results: Results, inputs: Inputs) -> None:
    """Raise AssertionError unless the results are those of the definition, indices to the bit."""
    compare(name, results, expected_results(inputs))


def check_agreement_in_part(name: str, results: Results, inputs: Inputs) -> None:
    """As `check_agreement`, where all distances would not fit into memory.

    The first rows' indices are compared with the definition's; everything else, with what follows from the
    contender's own indices.
    """
    rows = max(1, MAX_DISTANCES // inputs.codebook.numel())
    wanted = plain_indices(inputs.z[:rows], inputs.codebook)
    wrong = (results.indices[:rows] != wanted).sum().item()
    assert wrong == 0, f"{name}: indices are off in {wrong} places of {wanted.numel()}"
    compare(name, results, expected_from(results.indices.long(), inputs))


def compare(name: str, results: Results, expected: Expected) -> None:
    """Raise AssertionError unless every result is within its tolerance."""
    for field, value, wanted, tolerance in zip(
        Results._fields, results, expected.values, expected.tolerances, strict=True
    ):
        if value is None:
            continue
        assert value.shape == wanted.shape, f"{name}: {field} has shape {value.shape} instead of {wanted.shape}"
        excess = ((value.to(wanted.dtype) - wanted).abs() - tolerance).amax().item()
        assert excess <= 0, f"{name}: {field} is off by {excess} more than rounding explains"
