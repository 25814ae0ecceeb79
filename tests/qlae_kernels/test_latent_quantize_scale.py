"""The op at the ends of its range: one and 65,536 latents, one and 65,536 codes, for every backend."""

from typing import NamedTuple

import pytest
import torch
from latent_quantize_statement import (
    LONGEST_FLOAT_SUM,
    assert_same_bits,
    assert_within,
    gamma,
    nearest,
    quantized_at,
)
from on_device import latent_quantize
from torch import Tensor

pytestmark = pytest.mark.usefixtures("poisoned_memory")

WEIGHTS = {"quantization_weight": 0.75, "commitment_weight": 0.25}


class KnownAnswer(NamedTuple):
    """Inputs whose nearest codes are known because z was made from them; float64 where not said otherwise."""

    z: Tensor  # float32 [N, D]
    codebook: Tensor  # float32 [D, K]
    indices: Tensor  # int64 [N, D]
    residual: Tensor  # z - codebook[d, index]


def known_answer(samples: int, num_latents: int, levels: int, shuffled: bool) -> KnownAnswer:
    """Codes k / K on a grid, z at quarters of a gap from them: all numbers are exact in float32, ties included."""
    generator = torch.Generator().manual_seed(samples + num_latents + levels)
    gap = 2.0 ** -(levels - 1).bit_length()
    rank = torch.randint(levels, (samples, num_latents), generator=generator)
    quarters = torch.randint(-2, 3, (samples, num_latents), generator=generator)
    # place[d, r] is where latent d holds the code of rank r.
    place = torch.arange(levels).expand(num_latents, levels)
    if shuffled:
        place = torch.rand(num_latents, levels, generator=generator).argsort(1)
    grid = torch.arange(levels, dtype=torch.float64) * gap
    codebook = torch.empty(num_latents, levels, dtype=torch.float64)
    codebook.scatter_(1, place, grid.expand(num_latents, levels))
    z = grid[rank] + quarters * (gap / 4)
    # Half a gap away from a code, the smaller index of it and of the code on the other side wins.
    other = (rank + quarters.sign()).clamp(0, levels - 1)
    latents = torch.arange(num_latents)
    indices = place[latents, rank]
    indices = torch.where(quarters.abs() == 2, indices.minimum(place[latents, other]), indices)
    return KnownAnswer(z.float(), codebook.float(), indices, z - codebook[latents, indices])


SIZES = [
    pytest.param(3, 65_536, 1, id="65,536 latents of one level"),
    pytest.param(2, 65_536, 5, id="65,536 latents"),
    pytest.param(2200, 1, 1, id="one latent of one level"),
    pytest.param(3, 1, 65_536, id="one latent of 65,536 levels, few samples"),
    pytest.param(1500, 1, 65_536, id="one latent of 65,536 levels"),
    pytest.param(100, 3, 65_536, id="three latents of 65,536 levels"),
]


@pytest.mark.parametrize("shuffled", [False, True], ids=["in order", "shuffled"])
@pytest.mark.parametrize(("samples", "num_latents", "levels"), SIZES)
def test_indices_values_loss_and_gradients(
    backend: str, samples: int, num_latents: int, levels: int, shuffled: bool
) -> None:
    known = known_answer(samples, num_latents, levels, shuffled)
    z, codebook = known.z.requires_grad_(), known.codebook.requires_grad_()
    output = latent_quantize(z, codebook, backend=backend, **WEIGHTS)
    grad_quantized = torch.arange(z.numel(), dtype=torch.float32).view_as(z) % 7
    torch.autograd.backward((output.quantized, output.loss), (grad_quantized, torch.tensor(1.0)))
    assert_same_bits(output.indices, known.indices.int())
    codes = known.codebook.detach()[torch.arange(num_latents), known.indices]
    assert_same_bits(output.quantized, codes)

    # Eight roundings and those of the sum, as in `latent_quantize_statement`.
    longest = min(z.numel(), LONGEST_FLOAT_SUM)
    loss = sum(WEIGHTS.values()) * known.residual.square().mean()
    assert_within(output.loss, loss, gamma(longest + 8, torch.float32) * loss)
    scale = 2 / z.numel()
    from_loss = scale * WEIGHTS["commitment_weight"] * known.residual
    want = grad_quantized.double() + from_loss
    bound = gamma(8, torch.float32) * from_loss.abs() + gamma(2, torch.float32) * want.abs()
    assert_within(z.grad, want, bound)
    position = (known.indices + levels * torch.arange(num_latents)).flatten()
    terms = scale * WEIGHTS["quantization_weight"] * known.residual.flatten()
    want, sizes = (
        torch.zeros(codebook.numel(), dtype=torch.float64).index_add_(0, position, values).view_as(codebook)
        for values in (-terms, terms.abs())
    )
    assert_within(codebook.grad, want, gamma(longest + 8, torch.float32) * sizes)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16], ids=["float32", "float64", "bfloat16"]
)
def test_many_codes_of_any_spacing(backend: str, dtype: torch.dtype) -> None:
    # Normally distributed codes: gaps down to a unit in the last place, duplicates in bfloat16; one cluster that lies
    # closer than its neighbours allow the order alone to decide.
    generator = torch.Generator().manual_seed(0)
    compute = torch.float64 if dtype is torch.float64 else torch.float32
    spacing = torch.finfo(compute).eps
    codebook = torch.randn(2, 5000, generator=generator, dtype=torch.float64)
    codebook[1, :3000] = 1 + spacing * torch.arange(3000)
    codebook = codebook.to(dtype).to(compute)
    codebook = codebook[:, torch.randperm(5000, generator=generator)]
    z = torch.randn(290, 2, generator=generator, dtype=torch.float64) * 2
    z[:10] = torch.tensor([0.0, 1.0, 1 + 8 * spacing, 1e6, -1e6, 1e30, -1e30, torch.nan, torch.inf, -torch.inf])[
        :, None
    ]
    z = z.to(dtype)
    output = latent_quantize(z, codebook, backend=backend)
    indices = nearest(z, codebook)
    assert_same_bits(output.indices, indices.int())
    assert_same_bits(output.quantized, quantized_at(indices, z, codebook))
