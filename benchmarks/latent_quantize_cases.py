"""The work that the benchmarks of `latent_quantize` give to every contender."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Direction = Literal["forward", "backward", "forward + backward"]

# The paper's values.
QUANTIZATION_WEIGHT = 0.01
COMMITMENT_WEIGHT = 0.01

INDEX_BYTES = torch.int32.itemsize


@dataclass(frozen=True)
class Case:
    """Latents [batch, num_latents] of `dtype`, each with `levels` codes of its own."""

    batch: int
    num_latents: int
    levels: int
    dtype: torch.dtype = torch.float32

    @property
    def size(self) -> int:
        """The number of elements of z."""
        return self.batch * self.num_latents

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        return f"{self.batch:,} x {self.num_latents} x {self.levels}"

    def traffic(self, direction: Direction) -> int:
        """The bytes that must move: z in, quantized and int32 indices out; the gradient and z in, z's gradient out."""
        forward = self.size * (2 * self.dtype.itemsize + INDEX_BYTES)
        backward = self.size * 3 * self.dtype.itemsize
        return {"forward": forward, "backward": backward, "forward + backward": forward + backward}[direction]


@dataclass(frozen=True, eq=False)
class Inputs:
    """z and grad_quantized [N, D] of the case's dtype; codebook [D, K] float32, sorted and uneven as after training."""

    z: Tensor
    codebook: Tensor
    grad_quantized: Tensor


@lru_cache(maxsize=1)
def make_inputs(case: Case, device: torch.device | str = "cpu") -> Inputs:
    """The same inputs for every contender, which must not change them.

    z is uniform in [-0.6, 0.6]; the codes lie around an even grid over [-0.5, 0.5].
    """
    generator = torch.Generator().manual_seed(0)
    z = torch.rand(case.batch, case.num_latents, generator=generator) * 1.2 - 0.6
    shift = torch.rand(case.num_latents, case.levels, generator=generator) * 0.6 - 0.3
    codebook = torch.linspace(-0.5, 0.5, case.levels) + shift / max(1, case.levels - 1)
    grad_quantized = torch.randn(case.batch, case.num_latents, generator=generator)
    return Inputs(z.to(device, case.dtype), codebook.to(device), grad_quantized.to(device, case.dtype))


class Results(NamedTuple):
    """What a contender returns for one step; None where it does not follow the paper's definition."""

    quantized: Tensor
    indices: Tensor | None
    loss: Tensor
    grad_z: Tensor | None
    grad_codebook: Tensor | None
