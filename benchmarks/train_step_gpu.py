"""A training step of a small convolutional autoencoder with the fused and with the plain PyTorch quantizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from gpu_measurement import Block, host_seconds, time_in_turn
from measurement import median_and_quartiles
from torch import Tensor, nn

from qlae_kernels import FusedLatentQuantizer

NUM_LATENTS = 12


class Autoencoder(nn.Module):
    """Images [B, 3, size, size] to 12 latents and back; size a multiple of 16, or 0 for latents alone."""

    def __init__(self, size: int, width: int, backend: str) -> None:
        super().__init__()
        side = size // 16
        self.encoder = nn.Sequential(
            nn.Conv2d(3, width, 4, 2, 1),
            nn.SiLU(),
            nn.Conv2d(width, 2 * width, 4, 2, 1),
            nn.SiLU(),
            nn.Conv2d(2 * width, 4 * width, 4, 4),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(4 * width * side * side, NUM_LATENTS),
        )
        self.quantizer = FusedLatentQuantizer(NUM_LATENTS, backend=backend)
        self.decoder = nn.Sequential(
            nn.Linear(NUM_LATENTS, 4 * width * side * side),
            nn.Unflatten(1, (4 * width, side, side)),
            nn.SiLU(),
            nn.ConvTranspose2d(4 * width, 2 * width, 4, 4),
            nn.SiLU(),
            nn.ConvTranspose2d(2 * width, width, 4, 2, 1),
            nn.SiLU(),
            nn.ConvTranspose2d(width, 3, 4, 2, 1),
        )

    def forward(self, images: Tensor) -> Tensor:
        """The loss: reconstruction error and the quantizer's own."""
        quantized, _, loss = self.quantizer(self.encoder(images))
        return (self.decoder(quantized) - images).square().mean() + loss


def make_step(size: int, width: int, batch: int, backend: str, device: torch.device) -> Callable[[], Tensor]:
    """A function that does one step of AdamW on a fixed batch and returns the loss before it."""
    torch.manual_seed(0)
    model = Autoencoder(size, width, backend).to(device)
    on_gpu = device.type == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=on_gpu, capturable=on_gpu)
    images = torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(1)).to(device)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = model(images)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def captured(step: Callable[[], Tensor]) -> Callable[[], object]:
    """The step as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def replay(_parameters_of: Callable[[], Tensor] = step) -> None:
        # The graph reads and writes the step's parameters, which would be freed with it.
        graph.replay()

    return replay


def measure(device: torch.device, quick: bool) -> list[dict[str, Any]]:
    """Seconds per step, from an idle device to an idle device, for the fused and the plain quantizer in turn."""
    rows = []
    for size, width, batch in ((16, 4, 8),) if quick else ((32, 16, 128), (64, 32, 128)):
        steps = {backend: make_step(size, width, batch, backend, device) for backend in ("auto", "reference")}
        losses = [step().item() for step in steps.values()]
        # One float32 sum over the latents, in another order.
        assert abs(losses[0] - losses[1]) <= 1e-4 * abs(losses[0]), losses
        blocks = {(backend, "eager"): make_block(step, quick) for backend, step in steps.items()}
        if device.type == "cuda":
            for backend in steps:
                graph = captured(make_step(size, width, batch, backend, device))
                blocks[backend, "CUDA graph"] = make_block(graph, quick)
        for (backend, mode), values in time_in_turn(blocks, host_seconds, 0.0 if quick else 1.5, 15).items():
            median, first, third = median_and_quartiles(values)
            rows.append(
                {
                    "network": f"{batch} x 3 x {size} x {size}, width {width}",
                    "quantizer": backend,
                    "mode": mode,
                    "seconds": median,
                    "iqr": third - first,
                    "samples": values,
                }
            )
    return rows


def make_block(step: Callable[[], object], quick: bool) -> Block:
    """Some steps one after the other."""
    calls = 1 if quick else 20

    def run() -> None:
        for _ in range(calls):
            step()

    return Block(run, calls)
