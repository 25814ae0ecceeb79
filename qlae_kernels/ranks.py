"""What the processes of a distributed run share: counts, latents, and a codebook that FSDP2 keeps in shards."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

# Not every build of PyTorch has it.
if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def summed(counts: Tensor, group: ProcessGroup | None) -> Tensor:
    """The sum over the ranks of `group`, in place; counts as they are where there is no group."""
    if group is not None:
        dist.all_reduce(counts, group=group)
    return counts


def rows_of_all(rows: Tensor, group: ProcessGroup | None) -> Tensor:
    """The rows [N, D] of all ranks of `group`, one rank's below another's, with rows of NaN where N differs."""
    if group is None:
        return rows
    most = torch.tensor(rows.size(0), device=rows.device)
    dist.all_reduce(most, dist.ReduceOp.MAX, group)
    padded = rows.new_full((int(most), rows.size(1)), torch.nan)
    padded[: rows.size(0)] = rows
    parts = [torch.empty_like(padded) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, padded, group)
    return torch.cat(parts)


def from_first(values: Tensor, group: ProcessGroup | None) -> Tensor:
    """The values of the first rank of `group`, in place; as they are where there is no group."""
    if group is not None:
        dist.broadcast(values, group=group, group_src=0)
    return values


def is_sharded(codebook: Tensor) -> bool:
    """Whether it is a DTensor, as FSDP2 and `distribute_module` make of parameters, spread over ranks."""
    # By what it can do: importing torch.distributed.tensor takes longer than all of this package.
    return hasattr(codebook, "full_tensor")


def whole(codebook: Tensor) -> Tensor:
    """A codebook with all its codes on this rank; gathers a sharded one, which all its ranks must do together.

    Raises RuntimeError where a sharded one would have to be differentiated: its gradient would miss the other ranks'.
    """
    if not is_sharded(codebook):
        return codebook
    if torch.is_grad_enabled() and codebook.requires_grad:
        raise RuntimeError(
            "the codebook is sharded (a DTensor, as FSDP2 keeps parameters) and gets gradients only inside the forward "
            "of a module that fully_shard was applied to. Call this inside that forward; or under torch.no_grad(), on "
            "all ranks together; or apply fully_shard to the quantizer itself, and for a method other than forward "
            "torch.distributed.fsdp.register_fsdp_forward_method(quantizer, NAME). Where distribute_module or a plan "
            "of tensor parallelism made the DTensor, leave the quantizer out of it: such codebooks get no gradients"
        )
    return codebook.full_tensor()


@torch.no_grad()
def overwrite(codebook: Tensor, codes: Tensor) -> None:
    """Copy codes of the codebook's shape into it; a sharded one takes each shard from the first rank's codes."""
    if is_sharded(codebook):
        from torch.distributed.tensor import distribute_tensor

        codes = distribute_tensor(codes.to(codebook.device, codebook.dtype), codebook.device_mesh, codebook.placements)
    codebook.copy_(codes)
