"""Small calls of `latent_quantize` that take every path of a GPU backend's kernels; for compute-sanitizer.

    compute-sanitizer --tool memcheck python benchmarks/latent_quantize_sanitizer_case.py BACKEND

Ends with an error if a result is not that of the CPU kernels.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from qlae_kernels import latent_quantize

# Shape with the latents at dimension 1, codes per latent, rows of the codebook (None: one per latent).
CASES: list[tuple[tuple[int, ...], int, int | None]] = [
    ((1, 1), 1, None),
    ((128, 12), 10, None),
    ((513, 5), 16, 1),
    ((2049, 16), 10, None),
    ((700, 3), 64, None),
    ((700, 3), 300, None),
    ((40, 130), 17, None),
    ((9, 2), 4096, None),
    ((3, 4, 49), 10, None),
    ((2, 3, 4096), 10, 1),
    ((20_000, 3), 7, None),
]
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def run_case(z: Tensor, codebook: Tensor, grad: Tensor, backend: str, **options: object) -> list[Tensor]:
    """quantized, indices and both gradients, on the CPU."""
    z, codebook = z.detach().requires_grad_(), codebook.detach().requires_grad_()
    output = latent_quantize(z, codebook, backend=backend, **options)
    incoming = (grad, torch.ones_like(output.loss))
    gradients = torch.autograd.grad((output.quantized, output.loss), (z, codebook), incoming)
    return [tensor.detach().cpu() for tensor in (output.quantized, output.indices, *gradients)]


def main(backend: str, device: str = "cuda") -> None:
    """Run every case in every dtype, with latents in order, unaligned, and of unequal numbers of codes."""
    generator = torch.Generator().manual_seed(0)
    calls = 0
    for number, (shape, levels, rows) in enumerate(CASES):
        for dtype in DTYPES if number < 4 else DTYPES[number % 4 :][:1]:
            compute = torch.float64 if dtype is torch.float64 else torch.float32
            memory = torch.randn(torch.Size(shape).numel() + 1, generator=generator).to(dtype)
            codebook = torch.randn(rows or shape[1], levels, generator=generator).to(compute)
            grad = torch.randn(shape, generator=generator).to(dtype)
            ragged = [1 + (3 * row) % levels for row in range(codebook.size(0))]
            for offset, options in ((0, {}), (1, {"levels": ragged}), (0, {"index_dtype": torch.int64})):
                z = memory[offset : memory.numel() - 1 + offset].view(shape)
                on_device = memory.to(device)[offset : memory.numel() - 1 + offset].view(shape)
                got = run_case(on_device, codebook.to(device), grad.to(device), backend, **options)
                want = run_case(z, codebook, grad, "cpu", **options)
                assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1]), (shape, levels, dtype, options)
                for value, wanted in zip(got[2:], want[2:], strict=True):
                    torch.testing.assert_close(value, wanted, rtol=1e-2, atol=1e-4)
                calls += 1
    print(f"{calls} calls of {backend} equal those of the CPU kernels")


if __name__ == "__main__":
    main(*sys.argv[1:])
