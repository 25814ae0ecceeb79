"""Runs vector-quantize-pytorch's `LatentQuantize` beside `FusedLatentQuantizer`; its output stands in the page beside.

python docs/coming_from_vector_quantize_pytorch.py [--ours]     (--ours leaves the other library out)
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from qlae_kernels import FusedLatentQuantizer


def peer(levels: list[int], **options: Any) -> Any:
    """vector-quantize-pytorch's module with our default weights."""
    from vector_quantize_pytorch import LatentQuantize

    weights = {"commitment_loss_weight": 0.01, "quantization_loss_weight": 0.01}
    return LatentQuantize(levels=levels, dim=len(levels), **(weights | options))


def ours(levels: list[int], **options: Any) -> FusedLatentQuantizer:
    return FusedLatentQuantizer(len(levels), levels, **options)


def latents(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def codes_of(quantizer: Any) -> list[Tensor]:
    """The codes of each latent, of either library."""
    if isinstance(quantizer, FusedLatentQuantizer):
        return [row[:count] for row, count in zip(quantizer.codebook, quantizer.levels, strict=True)]
    return list(quantizer.values_per_latent)


def initial_codes(make: Callable[..., Any]) -> str:
    return ", ".join(f"{value:.3f}" for value in codes_of(make([4, 4]))[0].tolist())


def codebook_gradient(make: Callable[..., Any]) -> str:
    """The largest gradient of a code from the loss alone."""
    quantizer = make([4, 4])
    quantizer(latents(64, 2).requires_grad_())[2].backward()
    gradients = [each.grad for each in quantizer.parameters()]
    if any(each is None for each in gradients):
        return "None"
    return f"{max(each.abs().max().item() for each in gradients):.4f} at most"


def latent_gradient(make: Callable[..., Any]) -> str:
    """The largest gradient of a latent from the loss alone, with both weights the same."""
    z = latents(64, 2).requires_grad_()
    make([4, 4])(z)[2].backward()
    return f"{z.grad.abs().max().item():.4f} at most"


def round_trip(make: Callable[..., Any]) -> str:
    """Values from indices after all codes have moved by 1, and what they should be."""
    quantizer = make([5, 5])
    with torch.no_grad():
        for each in quantizer.parameters():
            each += 1
    quantized, indices, _ = quantizer(torch.tensor([[1.24, 0.51]]))
    decode = quantizer.decode if isinstance(quantizer, FusedLatentQuantizer) else quantizer.indices_to_codes
    rounded = [[round(value, 3) for value in row.flatten().tolist()] for row in (quantized, decode(indices))]
    return f"{rounded[0]} decoded as {rounded[1]}"


def memory_of_the_papers_codebook(make: Callable[..., Any]) -> str:
    """What [10] * 12 holds. The other library lists every combination: it is built for [10] * 4, and scaled."""
    if make is ours:
        codebook = make([10] * 12).codebook
        return f"{codebook.numel() * codebook.element_size()} bytes"
    listed = make([10] * 4).implicit_codebook
    # Its list of whole numbers on the way: one int64 per combination. The list itself: one number per latent of each.
    assert listed.shape == (10**4, 4)
    combinations = 10**12
    numbers = 8 * combinations / 1e12
    values = 12 * listed.element_size() * combinations / 1e12
    return f"{numbers:.0f} TB to number {combinations:.0e} combinations, then {values:.0f} TB to list them (not run)"


def fixed_codes(make: Callable[..., Any]) -> str:
    """Whether codes that do not learn move with the module and are saved."""
    quantizer = make([4, 4], learnable=False) if make is ours else make([4, 4], optimize_values=False)
    saved = "saved" if any("codebook" in name or "values" in name for name in quantizer.state_dict()) else "not saved"
    quantizer.to(torch.float64)
    dtype = str(codes_of(quantizer)[0].dtype).removeprefix("torch.")
    return f"{saved}; {dtype} after .to(torch.float64)"


def in_place_optimizer(make: Callable[..., Any]) -> str:
    """One update of the codes by an optimizer that the quantizer holds, or that is made for it."""
    if make is ours:
        quantizer = make([4, 4])
        optimizer = torch.optim.SGD(quantizer.parameters(), lr=10.0)
        before = quantizer.codebook.detach().clone()
        quantizer(latents(64, 2)).loss.backward()
        optimizer.step()
        return "codes moved" if not torch.equal(before, quantizer.codebook) else "codes did not move"
    outcomes = []
    for learns in (True, False):
        try:
            quantizer = make(
                [4, 4],
                optimize_values=learns,
                in_place_codebook_optimizer=lambda parameters: torch.optim.SGD(parameters, lr=10.0),
            )
            before = [each.clone() for each in codes_of(quantizer)]
            quantizer(latents(64, 2).requires_grad_())
        except Exception as error:
            outcomes.append(f"optimize_values={learns}: {type(error).__name__}")
        else:
            moved = any(not torch.equal(one, other) for one, other in zip(before, codes_of(quantizer), strict=True))
            outcomes.append(f"optimize_values={learns}: codes {'moved' if moved else 'did not move'}")
    return "; ".join(outcomes)


def half_precision(make: Callable[..., Any]) -> str:
    """All combinations of 16 x 16 x 16 codes through a quantizer in bfloat16: how many packed indices come out."""
    quantizer = make([16, 16, 16]).to(torch.bfloat16)
    z = torch.cartesian_prod(*(each.detach() for each in codes_of(quantizer)))
    indices = quantizer(z)[1]
    packed = quantizer.pack(indices) if make is ours else indices
    return f"{packed.unique().numel()} packed indices"


def quantized_is_a_code(make: Callable[..., Any]) -> str:
    quantizer = make([10, 10])
    quantized = quantizer(latents(1000, 2))[0]
    return f"{len(set(quantized[:, 0].tolist()))} different values of 10 codes"


def loss_in_evaluation(make: Callable[..., Any]) -> str:
    return f"{make([5, 5]).eval()(latents(64, 2))[2].item():.5f}"


ROWS: dict[str, Callable[[Callable[..., Any]], str]] = {
    "4 initial codes": initial_codes,
    "gradient of the codes from the loss": codebook_gradient,
    "gradient of the latents from the loss": latent_gradient,
    "codes + 1, then a round trip": round_trip,
    "quantized holds": quantized_is_a_code,
    "memory of [10] * 12": memory_of_the_papers_codebook,
    "fixed codes": fixed_codes,
    "an optimizer for the codes": in_place_optimizer,
    "16 x 16 x 16 combinations in bfloat16": half_precision,
    "loss after .eval()": loss_in_evaluation,
}


def report(libraries: dict[str, Callable[..., Any]]) -> str:
    """What each library does, one question after another."""
    lines = []
    for question, answer in ROWS.items():
        lines += [question, *(f"    {name}: {answer(make)}" for name, make in libraries.items())]
    return "\n".join(lines)


def main() -> None:
    """Print the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ours", action="store_true", help="leave vector-quantize-pytorch out")
    if parser.parse_args().ours:
        print(report({"qlae_kernels": ours}))
    else:
        print(report({f"vector-quantize-pytorch {version('vector-quantize-pytorch')}": peer, "qlae_kernels": ours}))


if __name__ == "__main__":
    main()
