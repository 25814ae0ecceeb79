"""What two gloo processes do in `test_distributed.py`, which starts them once for all.

Each function of `SCENARIOS` runs on both ranks at the same time and returns what the tests look at. It lies in a
module of its own since the processes have to import it.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed import group
from torch.distributed.algorithms.join import Join
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import distribute_module
from torch.nn.parallel import DistributedDataParallel

from qlae_kernels import FusedLatentQuantizer, available_backends
from qlae_kernels.backends import BACKENDS

RANKS = 2
LEVELS = [4, 3, 5]
CPU_BACKENDS = [name for name in available_backends() if "cpu" in BACKENDS[name].DEVICE_TYPES]


class Model(nn.Module):
    """An autoencoder around a quantizer; its loss is a mean over the batch."""

    def __init__(self, backend: str = "auto", device: str | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Linear(6, 3, device=device)
        self.quantizer = FusedLatentQuantizer(
            3, LEVELS, quantization_weight=0.5, commitment_weight=0.25, backend=backend, device=device
        )
        self.decoder = nn.Linear(3, 6, device=device)

    def forward(self, x: Tensor) -> Tensor:
        quantized, _, loss = self.quantizer(self.encoder(x))
        return (self.decoder(quantized) - x).square().mean() + loss


def images(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name.removeprefix("module."): each.grad.clone() for name, each in model.named_parameters()}


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """Copies, whole where they are sharded."""
    return {
        name: (each.full_tensor() if hasattr(each, "full_tensor") else each).detach().clone()
        for name, each in model.named_parameters()
    }


def refusal(call: Callable[[], Any]) -> tuple[str, str]:
    """The kind and the text of the error that a call ends in."""
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error)
    return "", "no error"


def ddp_equal_batches(rank: int, folder: Path) -> dict[str, dict[str, Tensor]]:
    """Gradients with half of the images on each rank, by backend."""
    results = {}
    for backend in CPU_BACKENDS:
        model = DistributedDataParallel(Model(backend))
        model(images(16).chunk(RANKS)[rank]).backward()
        results[backend] = gradients(model)
    return results


def ddp_uneven_batches(rank: int, folder: Path) -> list[dict[str, Tensor]]:
    """Gradients with 12 and 4 images, of the loss as it is and of the loss times its share."""
    model = DistributedDataParallel(Model())
    own = images(16).split([12, 4])[rank]
    results = []
    for weight in (1.0, len(own) * RANKS / 16):
        model.zero_grad()
        (weight * model(own)).backward()
        results.append(gradients(model))
    return results


def ddp_masks(rank: int, folder: Path) -> Tensor:
    """The codebook's gradient with 3 sequences of 4 positions on each rank, of which 10 and 5 count."""
    quantizer = FusedLatentQuantizer(3, LEVELS, channel_dim=-1)
    model = DistributedDataParallel(quantizer)
    z, mask = (each.chunk(RANKS)[rank] for each in sequences_and_mask())
    loss = model(z, mask).loss
    # The latents are as many at every position: positions that count weigh as elements do.
    (loss * mask.sum() * RANKS / 15).backward()
    return quantizer.codebook.grad.clone()


def sequences_and_mask() -> tuple[Tensor, Tensor]:
    z = torch.randn(6, 4, 3, generator=torch.Generator().manual_seed(2))
    counts = torch.tensor([4, 4, 2, 3, 1, 1])
    return z, torch.arange(4) < counts.unsqueeze(1)


def ddp_uneven_steps(rank: int, folder: Path) -> dict[str, Tensor]:
    """Parameters after two batches on rank 0 and one on rank 1, under Join."""
    model = DistributedDataParallel(Model())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    batches = [images(8, seed) for seed in ((1, 2) if rank == 0 else (3,))]
    with Join([model]):
        for batch in batches:
            optimizer.zero_grad()
            model(batch).backward()
            optimizer.step()
    return parameters(model.module)


def usage(rank: int, folder: Path) -> dict[str, Any]:
    """Usage of indices, of which rank 0 has two rows and rank 1 three, alone, together, and with a mask."""
    quantizer = FusedLatentQuantizer(2, [3, 2])
    indices = torch.tensor([[0, 0], [0, 1], [1, 1], [1, 0], [1, 1]]).split([2, 3])[rank]
    mask = torch.tensor([True, False, True, False, True]).split([2, 3])[rank]
    return {
        "alone": tuple(quantizer.usage(indices)),
        "together": tuple(quantizer.usage(indices, group=group.WORLD)),
        "masked": tuple(quantizer.usage(indices, mask, group.WORLD)),
    }


def initialization(rank: int, folder: Path) -> Tensor:
    """Codes from 5 and 8 latent vectors, with some that do not count."""
    quantizer = FusedLatentQuantizer(3, LEVELS)
    z, mask = (each.split([5, 8])[rank] for each in latents_and_mask())
    quantizer.initialize_from(z, mask, group.WORLD)
    return quantizer.codebook.detach()


def latents_and_mask() -> tuple[Tensor, Tensor]:
    z = torch.randn(13, 3, generator=torch.Generator().manual_seed(5))
    z[0, 0], z[9, 1] = torch.nan, -torch.inf
    mask = torch.ones(13, dtype=torch.bool)
    mask[3] = mask[12] = False
    return z, mask


def revival(rank: int, folder: Path) -> tuple[int, Tensor, int, Tensor]:
    """Code 0 is used on rank 0 alone, code 1 on rank 1 alone, 2 to 5 nowhere; each rank has two other values."""
    quantizer = FusedLatentQuantizer(1, 6, channel_dim=-1)
    used = quantizer.usage(torch.tensor([[rank]]))
    z = torch.tensor([[[10.0], [11.0]], [[20.0], [21.0]]])[rank]
    generator = torch.Generator().manual_seed(rank)
    revived = quantizer.revive_dead_codes(z, used, group=group.WORLD, generator=generator)
    shared = FusedLatentQuantizer(2, 3, shared_codebook=True, init_range=(0.0, 2.0))
    # Without a usage, z says: rank 0 uses code 0, rank 1 code 1.
    alive = shared.revive_dead_codes(torch.full((1, 2), rank + 0.25), group=group.WORLD)
    return revived, quantizer.codebook.detach(), alive, shared.codebook.detach()


def sharded(device: str | None = None) -> Model:
    model = Model(device=device)
    assert isinstance(fully_shard(model), FSDPModule)
    return model


def fsdp_training(rank: int, folder: Path) -> dict[str, Tensor]:
    """Parameters after three steps of Adam with half of the images on each rank."""
    model = sharded()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for seed in range(3):
        optimizer.zero_grad()
        model(images(16, seed).chunk(RANKS)[rank]).backward()
        optimizer.step()
    return parameters(model)


def fsdp_outside_forward(rank: int, folder: Path) -> dict[str, Any]:
    """The methods of a quantizer whose codebook is in shards."""
    quantizer = sharded().quantizer
    z = images(7)[:, :3]
    with torch.no_grad():
        results = {
            "type": type(quantizer.codebook).__name__,
            "forward": tuple(quantizer(z)),
            "encode": quantizer.encode(z),
            "decode": quantizer.decode(quantizer.encode(z)),
            "sample": quantizer.sample(9, torch.Generator().manual_seed(0)),
            "usage": tuple(quantizer.usage(quantizer.encode(z))),
        }
    indices = quantizer.encode(z)
    results["refusals"] = [
        refusal(lambda: quantizer(z)),
        refusal(lambda: quantizer.decode(indices)),
        refusal(lambda: quantizer.sample(3)),
    ]
    return results


def distributed_module(rank: int, folder: Path) -> dict[str, Any]:
    """A quantizer whose codebook `distribute_module` made a DTensor of, with no gradients and with them."""
    quantizer = distribute_module(FusedLatentQuantizer(3, LEVELS), init_device_mesh("cpu", (RANKS,)))
    z = images(7)[:, :3]
    with torch.no_grad():
        indices = quantizer(z).indices
    return {"indices": indices, "refusal": refusal(lambda: quantizer(z))}


def fsdp_mixed_precision(rank: int, folder: Path) -> list[tuple[torch.dtype, torch.dtype, torch.dtype]]:
    """Dtypes of z, of the codes in forward and of their gradient in bfloat16; then with a quantizer that is apart."""
    results = []
    for apart in (False, True):
        model = Model()
        if apart:
            fully_shard(model.quantizer)
        fully_shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
        seen = []
        model.quantizer.register_forward_hook(
            lambda module, inputs, _, seen=seen: seen.extend((inputs[0].dtype, module.codebook.dtype))
        )
        model(images(8)).backward()
        results.append((*seen, model.quantizer.codebook.grad.dtype))
    return results


def fsdp_registered_method(rank: int, folder: Path) -> Tensor:
    """The codebook's gradient through `decode`, registered with FSDP2; each rank decodes other indices."""
    quantizer = FusedLatentQuantizer(2, 3)
    fully_shard(quantizer)
    register_fsdp_forward_method(quantizer, "decode")
    quantizer.decode(torch.tensor([[rank, 2]])).sum().backward()
    return quantizer.codebook.grad.full_tensor()


def fsdp_codes(rank: int, folder: Path) -> dict[str, Any]:
    """Codes of a sharded codebook that are set: by `reset_parameters` after to_empty, from data, and revived."""
    model = sharded("meta")
    model.to_empty(device="cpu")
    quantizer = model.quantizer
    quantizer.reset_parameters()
    results: dict[str, Any] = {"reset": quantizer.codebook.full_tensor().detach()}
    z, mask = (each.split([5, 8])[rank] for each in latents_and_mask())
    results["refusals"] = [
        refusal(lambda: quantizer.initialize_from(z)),
        refusal(lambda: quantizer.revive_dead_codes(z)),
    ]
    quantizer.initialize_from(z, mask, group.WORLD)
    results["initialized"] = quantizer.codebook.full_tensor().detach()
    with torch.no_grad():
        used = quantizer.usage(torch.zeros(1, 3, dtype=torch.int64))
    results["revived"] = quantizer.revive_dead_codes(
        torch.tensor([[100.0 + rank, 200.0 + rank, 300.0 + rank]]), used, group=group.WORLD
    )
    results["codes"] = quantizer.codebook.full_tensor().detach()
    results["type"] = type(quantizer.codebook).__name__
    return results


def fsdp_checkpoint(rank: int, folder: Path) -> dict[str, Any]:
    """A checkpoint that both ranks write and read, and a full state from rank 0."""
    source, target = sharded(), sharded()
    with torch.no_grad():
        source.quantizer.codebook.add_(torch.tensor(3.0))
    dcp.save({"model": get_model_state_dict(source)}, checkpoint_id=folder / "checkpoint")
    state = {"model": get_model_state_dict(target)}
    dcp.load(state, checkpoint_id=folder / "checkpoint")
    set_model_state_dict(target, state["model"])
    results: dict[str, Any] = {"loaded": target.quantizer.codebook.full_tensor().detach()}

    full = get_model_state_dict(source, options=StateDictOptions(full_state_dict=True))
    results["keys"] = list(full)
    again = sharded()
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(again, full if rank == 0 else {}, options=options)
    results["broadcast"] = again.quantizer.codebook.full_tensor().detach()

    other = Model()
    other.quantizer = FusedLatentQuantizer(3, [4, 5, 5])
    fully_shard(other)
    results["refusal"] = refusal(lambda: set_model_state_dict(other, source.state_dict()))
    return results


SCENARIOS: dict[str, Callable[[int, Path], Any]] = {
    each.__name__: each
    for each in (
        ddp_equal_batches,
        ddp_uneven_batches,
        ddp_masks,
        ddp_uneven_steps,
        usage,
        initialization,
        revival,
        fsdp_training,
        fsdp_outside_forward,
        distributed_module,
        fsdp_mixed_precision,
        fsdp_registered_method,
        fsdp_codes,
        fsdp_checkpoint,
    )
}


def run_rank(rank: int, folder: Path) -> None:
    """Run all scenarios on one rank and leave their results, or their errors, in the folder."""
    torch.set_num_threads(1)
    # A rank that fails leaves the other waiting.
    dist.init_process_group("gloo", f"file://{folder}/store", timedelta(seconds=30), rank=rank, world_size=RANKS)
    for name, scenario in SCENARIOS.items():
        try:
            result = scenario(rank, folder)
        except Exception:
            result = traceback.format_exc()
        torch.save(result, folder / f"{name}-{rank}.pt")
    dist.destroy_process_group()


def run(folder: Path) -> dict[str, list[Any]]:
    """The results of all scenarios: one for each rank; an error is its text."""
    mp.spawn(run_rank, (folder,), nprocs=RANKS)
    return {name: [torch.load(folder / f"{name}-{rank}.pt") for rank in range(RANKS)] for name in SCENARIOS}
