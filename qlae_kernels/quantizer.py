"""`FusedLatentQuantizer`: the quantizer as an nn.Module with a codebook that learns."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from operator import index
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from qlae_kernels.backends import check_name
from qlae_kernels.code_usage import CodeUsage, count_codes, dead_codes
from qlae_kernels.codes_from_data import quantile_codes, replace_codes, usable
from qlae_kernels.latent_quantize import (
    LatentQuantizerOutput,
    as_weight,
    check_index_dtype,
    check_weight,
    latent_quantize,
)
from qlae_kernels.latent_quantize_reference import values_of
from qlae_kernels.mask import check_mask
from qlae_kernels.problem import INDEX_DTYPES
from qlae_kernels.ranks import from_first, is_sharded, overwrite, rows_of_all, summed, whole
from qlae_kernels.torch_internals import are_functorch_transforms_active, dispatch_modes

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

MAX_INT64 = 2**63 - 1


class FusedLatentQuantizer(nn.Module):
    """Quantize each latent to the nearest value of its own learned scalar codebook (arXiv 2305.18378, section 3).

    Calling it on z [..., D, ...] returns `LatentQuantizerOutput(quantized, indices, loss)`; add `loss` to the
    objective. See `latent_quantize` for the formulas, the gradients and the errors of a call.

    Args:
        num_latents: the number of latents D.
        levels: codes per latent: one K for all, or D values.
        channel_dim: the dimension of z that counts the latents: 1 for (B, D) and (B, D, H, W), -1 for (B, N, D).
        quantization_weight: weight of the loss that moves the codes towards z; finite, 0 or more.
        commitment_weight: weight of the loss that moves z towards the codes; finite, 0 or more.
        init_range: first and last of the K evenly spaced initial codes.
        learnable: False keeps the codes fixed, as a buffer.
        shared_codebook: True uses one codebook for all latents (the paper's 'global' ablation); needs one K.
        index_dtype: dtype of indices; torch.uint8, int16, int32 or int64.
        backend: "auto", "cpu", "reference", "triton" or "cuda".
        device, dtype: of the codebook.

    The attribute `codebook` is a Parameter (a buffer if fixed) of shape [D, max K], or [1, K] if shared; a latent with
    fewer codes leaves the rest of its row unused. Beside it the state_dict holds the levels as `_extra_state` (int64
    [D], on the CPU). Loading a state of other levels is an error that names both; one without levels loads if its
    codebook has the right shape.

    Distributed: DDP and FSDP2 (`fully_shard`) average gradients over ranks, so ranks with the same number of elements
    yield the gradient of the joined batch. Where numbers n_r differ, n_r being the elements that a mask leaves,
    multiply each rank's loss by n_r * (number of ranks) / sum of n_r, or every rank weighs the same. Under FSDP2 the
    codebook is whole inside the forward of the module that it was applied to. Elsewhere `encode`, `decode`, `sample`
    and a call gather it, which takes all ranks, and is refused (RuntimeError) where the codebook would need a gradient.
    So is every other DTensor, such as `distribute_module` makes of parameters.

    Raises:
        ValueError: sizes, levels or `init_range` that make no codebook, a weight that is negative or not finite, or
            `index_dtype` too small for K.
        TypeError: a weight is no number, or `index_dtype` no index dtype.
    """

    codebook: Tensor

    def __init__(
        self,
        num_latents: int,
        levels: int | Sequence[int] = 10,
        *,
        channel_dim: int = 1,
        quantization_weight: float = 0.01,
        commitment_weight: float = 0.01,
        init_range: tuple[float, float] = (-0.5, 0.5),
        learnable: bool = True,
        shared_codebook: bool = False,
        index_dtype: torch.dtype = torch.int32,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        per_latent = tuple(map(index, levels)) if isinstance(levels, Iterable) else (index(levels),) * num_latents
        if num_latents < 1 or len(per_latent) != num_latents or min(per_latent, default=0) < 1:
            raise ValueError(
                f"levels must be one number >= 1 or one per latent, with num_latents >= 1; "
                f"got num_latents={num_latents}, levels={levels}"
            )
        if shared_codebook and len(set(per_latent)) > 1:
            raise ValueError(f"a shared codebook needs the same number of codes for all latents; got levels={levels}")
        if len(init_range) != 2 or not all(map(math.isfinite, init_range)) or init_range[0] > init_range[1]:
            raise ValueError(f"init_range must be two finite numbers (low, high); got {init_range}")
        check_index_dtype(index_dtype, max(per_latent))
        check_name(backend)
        self.num_latents = num_latents
        self.levels = per_latent
        self.channel_dim = channel_dim
        self.quantization_weight = as_weight("quantization_weight", quantization_weight)
        self.commitment_weight = as_weight("commitment_weight", commitment_weight)
        check_weight("quantization_weight", self.quantization_weight)
        check_weight("commitment_weight", self.commitment_weight)
        self.init_range = (float(init_range[0]), float(init_range[1]))
        self.learnable = learnable
        self.shared_codebook = shared_codebook
        self.index_dtype = index_dtype
        self.backend = backend
        self._ragged_levels = per_latent if len(set(per_latent)) > 1 else None
        rows = 1 if shared_codebook else num_latents
        codebook = torch.empty(rows, max(per_latent), device=device, dtype=dtype)
        if learnable:
            self.codebook = nn.Parameter(codebook)
        else:
            self.register_buffer("codebook", codebook)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set each latent's codes to evenly spaced values over `init_range`, both ends included.

        A sharded codebook takes all its ranks together. Raises no errors of its own.
        """
        # On the CPU for every device: the same bits everywhere, and a codebook without memory (meta) takes them too.
        codes = torch.zeros(self.codebook.shape, dtype=self.codebook.dtype, device="cpu")
        for row, count in zip(codes, self.levels, strict=False):
            row[:count] = torch.linspace(*self.init_range, count, dtype=row.dtype, device="cpu")
        self._set_codes(codes)

    @torch.no_grad()
    def initialize_from(self, z: Tensor, mask: Tensor | None = None, group: ProcessGroup | None = None) -> None:
        """Set code k of each latent with K codes to the (k + 1/2) / K quantile of that latent in z.

        Quantiles between two values are interpolated linearly; a shared codebook takes those of all latents pooled.
        Where z has few different values, codes coincide. Fixed codes are set too. An optimizer that has made steps
        keeps its state: make a new one.

        Args:
            z: latents [..., D, ...] of any floating dtype and size, on the codebook's device. NaN and values that are
                infinite in the codebook's dtype are left out. Sorting takes several times the memory of z in float32.
            mask: bool of z's shape without `channel_dim`; True where a position counts. None: everywhere.
            group: the ranks that call this together, each with its own z: all get the quantiles of the joined data,
                which each of them holds for a while. torch.distributed.group.WORLD is all ranks; None is this process
                alone, and leaves the ranks of a DDP model with different codes.

        Raises:
            ValueError: a latent has no value to go by; z or mask has a wrong shape; or no group for sharded codes.
            TypeError: z is no tensor of a floating dtype, or mask not bool.
        """
        self._check_group(group)
        rows = rows_of_all(self._latent_rows(z, mask), group)
        if self.shared_codebook:
            rows = rows.reshape(-1, 1)
        codes = quantile_codes(rows, self.levels[: rows.size(1)])
        self._set_codes(from_first(codes.to(self.codebook.dtype), group))

    @torch.no_grad()
    def revive_dead_codes(
        self,
        z: Tensor,
        usage: CodeUsage | None = None,
        mask: Tensor | None = None,
        group: ProcessGroup | None = None,
        generator: torch.Generator | None = None,
    ) -> int:
        """Set codes that were never used to values of their latent in z; returns how many codes were set.

        The values are drawn uniformly without replacement, leaving out those that are codes in use or were drawn
        already, in the codebook's dtype. A latent with fewer such values than dead codes revives that many. A shared
        code is dead where no latent used it.

        The state of an optimizer stays as it is. The gradient of an unused code is 0, so its momentum has died down;
        Adam's second moment has too, and its first steps on a revived code can be up to
        (1 - beta1) / sqrt(1 - beta2) times the learning rate, 3.2 at its defaults.

        Args:
            z: latents [..., D, ...] of any floating dtype, on the codebook's device. NaN and values that are infinite
                in the codebook's dtype are never drawn.
            usage: what says which codes are dead, such as the usage of many batches; None: that of the finite z.
            mask: bool of z's shape without `channel_dim`; True where a position counts, for usage and for drawing.
            group: the ranks that call this together, each with its own z and usage: a code is dead that no rank used,
                values are drawn from the z of all, and all end with the same codes. See `initialize_from`.
            generator: for a draw that can be repeated; on z's device. With a group the first rank's draw counts.

        Raises:
            RuntimeError: the codes are fixed (`learnable=False`).
            ValueError: z, mask or usage has a wrong shape, or no group for sharded codes.
            TypeError: z is no tensor of a floating dtype, or mask not bool.
        """
        if not self.learnable:
            raise RuntimeError(
                "the codes are fixed (learnable=False) and are not revived; initialize_from sets them from data"
            )
        self._check_group(group)
        rows = self._latent_rows(z, mask)
        if usage is None:
            # The index of a z that is not finite is 0, which is no use of code 0.
            finite = self._rows(z, mask).isfinite()
            usage = count_codes(self._rows(self.encode(z), mask).long(), self.levels, None, finite)
        if usage.counts.shape != (self.num_latents, max(self.levels)):
            raise ValueError(
                f"usage must be of {self.num_latents} latents and up to {max(self.levels)} codes, as usage() returns "
                f"it; got counts of shape {tuple(usage.counts.shape)}"
            )
        # Added up even if `usage` is of all ranks already: that leaves used codes used.
        counts = summed(usage.counts.to(rows.device, copy=True), group)
        if self.shared_codebook:
            rows, counts = rows.reshape(-1, 1), counts.sum(0, keepdim=True)
        dead = dead_codes(counts, self.levels[: counts.size(0)])
        codes, revived = replace_codes(whole(self.codebook), counts > 0, dead, rows_of_all(rows, group), generator)
        self._set_codes(from_first(codes, group))
        return int(revived.sum())

    def forward(self, z: Tensor, mask: Tensor | None = None) -> LatentQuantizerOutput:
        """Quantize z [..., D, ...]; returns (quantized, indices, loss), see `LatentQuantizerOutput`.

        `mask`, bool of z's shape without `channel_dim`, is True where a position counts; see `latent_quantize`, also
        for the errors.
        """
        return self._quantize(z, mask)

    @torch.no_grad()
    def encode(self, z: Tensor) -> Tensor:
        """The index of the nearest code for each element of z [..., D, ...], of `index_dtype`; no gradient.

        It is 0 where z is not finite. Raises what `latent_quantize` raises.
        """
        return self._quantize(z).indices

    def decode(self, indices: Tensor) -> Tensor:
        """The codes at `indices` [..., D, ...] (any integer dtype), of the codebook's dtype; differentiable in it.

        Raises ValueError for a wrong number of latents and where an index is outside its latent's codes, TypeError
        where `indices` is no tensor of integers. Where a call is traced (compiled, exported, under torch.func), this
        method, `pack`, `unpack` and `usage` do not see the values and do not check their range.
        """
        return values_of(self._checked(indices), whole(self.codebook), self.channel_dim)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n latent vectors [n, D] with each latent uniform over its codes; differentiable in the codebook.

        `generator` is on the codebook's device; None: PyTorch's own. Raises RuntimeError for n < 0 and for a sharded
        codebook that would need a gradient.
        """
        codebook = whole(self.codebook)
        counts = _along(-1, self.levels, codebook)
        # With the keyword, even of None, PyTorch cannot trace a dynamic n.
        draw = {} if generator is None else {"generator": generator}
        uniform = torch.rand(n, self.num_latents, dtype=torch.float64, device=codebook.device, **draw)
        # The product can round up to the count itself.
        indices = (uniform * counts).long().minimum(counts - 1)
        return values_of(indices, codebook, 1)

    def pack(self, indices: Tensor) -> Tensor:
        """One int64 per latent vector: the mixed-radix number whose digits are `indices`, the first latent lowest.

        indices [..., D, ...] of any integer dtype; returns int64 without the dimension `channel_dim`. Raises
        ValueError where the product of levels passes 2**63 - 1, and what `decode` raises.
        """
        indices = self._checked(indices)
        return (indices * _along(self.channel_dim, self._radices(), indices)).sum(self.channel_dim)

    def unpack(self, codes: Tensor) -> Tensor:
        """The inverse of `pack`: codes [...] (any integer dtype) to indices [..., D, ...] of `index_dtype`.

        Raises ValueError where a code is outside 0..product of levels - 1 or that product passes 2**63 - 1, TypeError
        where `codes` is no tensor of integers.
        """
        radices = self._radices()
        _check_integers("codes", codes)
        low, high = _range_of(codes)
        if low < 0 or high >= math.prod(self.levels):
            raise ValueError(f"codes must be in 0..{math.prod(self.levels) - 1}; got values from {low} to {high}")
        channel_dim = self.channel_dim % (codes.dim() + 1)
        codes = codes.long().unsqueeze(channel_dim)
        digits = codes.div(_along(channel_dim, radices, codes), rounding_mode="floor")
        return digits.remainder(_along(channel_dim, self.levels, codes)).to(self.index_dtype)

    def usage(self, indices: Tensor, mask: Tensor | None = None, group: ProcessGroup | None = None) -> CodeUsage:
        """Counts, perplexity and dead codes of `indices`; see `CodeUsage`, whose sum is the usage of several batches.

        Args:
            indices: [..., D, ...] of any integer dtype.
            mask: bool of the shape of `indices` without `channel_dim`; True where a position counts. Indices elsewhere
                may be anything. None: everywhere.
            group: the ranks that call this together, each with its own indices: all get the usage of all, for one
                all_reduce of the counts. torch.distributed.group.WORLD is all ranks; None is this process alone, and
                WORLD is None until `init_process_group` has been called.

        Raises ValueError where a shape is wrong or an index is outside its latent's codes, TypeError where `indices`
        is no tensor of integers or mask not bool. Under torch.vmap PyTorch counts one entry after the other, and takes
        no mask.
        """
        _check_integers("indices", indices)
        rows = self._rows(indices, mask).long()
        self._check_range(rows, -1)
        return count_codes(rows, self.levels, group)

    def get_extra_state(self) -> Tensor:
        """The levels, int64 [D] on the CPU: a codebook's shape does not tell [10, 4] from [10, 5]."""
        return torch.tensor(self.levels, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing to set: the levels were given at construction, and loading has compared them."""

    def extra_repr(self) -> str:
        """The arguments that tell this quantizer from another."""
        return (
            f"{self.num_latents}, levels={_brief(self.levels)}, channel_dim={self.channel_dim}, "
            f"quantization_weight={self.quantization_weight}, commitment_weight={self.commitment_weight}, "
            f"init_range={self.init_range}, learnable={self.learnable}, shared_codebook={self.shared_codebook}, "
            f"index_dtype={self.index_dtype}, backend={self.backend!r}"
        )

    def _quantize(self, z: Tensor, mask: Tensor | None = None) -> LatentQuantizerOutput:
        self._check_channels(z)
        return latent_quantize(
            z,
            whole(self.codebook),
            levels=self._ragged_levels,
            channel_dim=self.channel_dim,
            quantization_weight=self.quantization_weight,
            commitment_weight=self.commitment_weight,
            index_dtype=self.index_dtype,
            mask=mask,
            backend=self.backend,
        )

    def _check_channels(self, value: Tensor) -> None:
        if not isinstance(value, Tensor):
            raise TypeError(f"z must be a torch.Tensor; got {type(value).__name__}")
        shape, dim = value.shape, self.channel_dim
        if -len(shape) <= dim < len(shape) and shape[dim] == self.num_latents:
            return
        last = "" if dim == -1 else "; channel_dim=-1, at construction, is for latents in the last dimension"
        raise ValueError(
            f"expected {self.num_latents} latents at dimension {dim} (channel_dim); got shape {tuple(shape)}{last}"
        )

    def _checked(self, indices: Tensor) -> Tensor:
        """The indices as int64, their dtype, shape and range checked."""
        _check_integers("indices", indices)
        self._check_channels(indices)
        self._check_range(indices, self.channel_dim)
        return indices.long()

    def _check_range(self, indices: Tensor, channel_dim: int) -> None:
        low, high = _range_of(indices)
        if low >= 0 and high < min(self.levels):
            return
        if low < 0 or high >= max(self.levels) or (indices >= _along(channel_dim, self.levels, indices)).any():
            raise ValueError(
                f"indices must be in 0..levels - 1 with levels {_brief(self.levels)}; got values from {low} to {high}"
            )

    def _check_group(self, group: ProcessGroup | None) -> None:
        if group is None and is_sharded(self.codebook):
            raise ValueError(
                "the codebook is sharded over ranks, which must set it together: call this on all of them with "
                "group=torch.distributed.group.WORLD, or the group that it is sharded over"
            )

    def _rows(self, values: Tensor, mask: Tensor | None) -> Tensor:
        """Values [..., D, ...] as rows [N, D], without those that the mask leaves out."""
        self._check_channels(values)
        values = values.movedim(self.channel_dim, -1)
        if mask is None:
            return values.reshape(-1, self.num_latents)
        check_mask(mask, values.shape, -1, values.device)
        return values[mask]

    def _latent_rows(self, z: Tensor, mask: Tensor | None) -> Tensor:
        """The values of z that codes may take, [N, D] with NaN in place of others."""
        if not isinstance(z, Tensor) or not z.is_floating_point():
            given = z.dtype if isinstance(z, Tensor) else type(z).__name__
            raise TypeError(f"z must be a tensor of a floating dtype; got {given}")
        return usable(self._rows(z, mask), self.codebook.dtype)

    def _set_codes(self, codes: Tensor) -> None:
        """Write codes [rows, max K] to the codebook, in whichever way it is held."""
        if is_parametrized(self, "codebook"):
            self.codebook = codes.to(self.codebook)
        else:
            overwrite(self.codebook, codes)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        codebook, levels = f"{prefix}codebook", f"{prefix}_extra_state"
        misfit = self._misfit(state_dict.get(codebook), state_dict.get(levels))
        if misfit is not None:
            error_msgs.append(f"{codebook}: {misfit}")
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        # A state without levels, as other code may make it, loads too.
        if levels in missing_keys:
            missing_keys.remove(levels)

    def _misfit(self, codebook: Tensor | None, levels: Tensor | None) -> str | None:
        """Why a saved codebook and its levels do not fit this module; None if they do."""
        saved_levels = None if levels is None or levels.is_meta else tuple(levels.tolist())
        same_shape = codebook is None or codebook.shape == self.codebook.shape
        if same_shape and saved_levels in (None, self.levels):
            return None
        # A state that holds no codebook, such as one of a parametrization, tells by its levels alone.
        saved = [] if codebook is None else [f"shape {tuple(codebook.shape)}"]
        if saved_levels is not None:
            saved.append(f"num_latents={len(saved_levels)}, levels={_brief(saved_levels)}")
        return (
            f"the state to load is of {', '.join(saved)}; this quantizer is of shape "
            f"{tuple(self.codebook.shape)}, num_latents={self.num_latents}, levels={_brief(self.levels)}, "
            f"shared_codebook={self.shared_codebook}. Build it with the arguments that the state was made with, or "
            "leave its codebook out of what you load"
        )

    def _radices(self) -> list[int]:
        if math.prod(self.levels) > MAX_INT64:
            raise ValueError(
                f"the product of levels, {math.prod(self.levels)}, passes 2**63 - 1: one int64 cannot hold the codes"
            )
        return [math.prod(self.levels[:latent]) for latent in range(self.num_latents)]


def _check_integers(name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor) or value.dtype not in INDEX_DTYPES:
        given = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must be a tensor of uint8, int16, int32 or int64; got {given}")


def _is_traced(value: Tensor) -> bool:
    """Whether a call on `value` is traced or transformed, or has no memory: its values cannot be looked at."""
    return torch.compiler.is_compiling() or value.is_meta or are_functorch_transforms_active() or dispatch_modes() > 0


def _range_of(values: Tensor) -> tuple[int, int]:
    """The smallest and the largest of whole numbers; 0 and 0 where there are none, or none to be looked at."""
    if _is_traced(values) or values.numel() == 0:
        return 0, 0
    low, high = torch.aminmax(values)
    return int(low), int(high)


def _along(channel_dim: int, values: Sequence[int], like: Tensor) -> Tensor:
    """Whole numbers, one per latent, in a shape that broadcasts with `like`."""
    # What is made under a tracer is the tracer's, and is not to be kept.
    make = _whole_numbers if _is_traced(like) else _kept_whole_numbers
    shape = [1] * like.dim()
    shape[channel_dim] = len(values)
    return make(tuple(values), like.device).view(shape)


def _whole_numbers(values: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device)


# Making a tensor of a few numbers takes longer than decoding a small batch.
_kept_whole_numbers = lru_cache(maxsize=256)(_whole_numbers)


def _brief(levels: Sequence[int]) -> int | list[int]:
    return levels[0] if len(set(levels)) == 1 else list(levels)
