"""Every backend with every instruction set, and memory that shows when an output was not written."""

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from qlae_kernels import latent_quantize_cpu

# For the modules that the tests of this folder share.
sys.path.insert(0, str(Path(__file__).parent))

from backend_variants import EMULATED, INSTRUCTION_SETS, VARIANTS


@contextmanager
def sorting_from(samples: int) -> Iterator[None]:
    """Sort the codebook from this many samples per latent on; never, where they are very many."""
    before = latent_quantize_cpu._native.set_min_samples_to_sort(samples)
    yield
    latent_quantize_cpu._native.set_min_samples_to_sort(before)


@pytest.fixture(params=[0, 1 << 40], ids=["sorted", "direct"])
def search(request: pytest.FixtureRequest) -> Iterator[None]:
    """The searches in a sorted codebook, and the direct one."""
    with sorting_from(request.param):
        yield


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def emulated_cuda_module(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The CUDA kernels compiled for the CPU."""
    from emulated_cuda import build

    return build(tmp_path_factory.mktemp("emulated_cuda"))


@pytest.fixture(params=VARIANTS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of a backend; `cpu` with each instruction set that this machine runs and each kind of search.

    `cuda-emulated` is the CUDA kernels on the CPU.
    """
    if request.param == EMULATED:
        from emulated_cuda import registered

        with registered(request.getfixturevalue("emulated_cuda_module")) as name:
            yield name
        return
    if not request.param.startswith("cpu-"):
        yield request.param
        return
    name, *choices = request.param.split("-")
    with (
        latent_quantize_cpu.use_instruction_set(choices[0]),
        sorting_from(0) if "sorted" in choices else nullcontext(),
    ):
        yield name


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """An instruction set that the CPU kernels use during the test."""
    with latent_quantize_cpu.use_instruction_set(request.param):
        yield request.param


def poison(tensor: Tensor) -> Tensor:
    """Fill with NaN, or with the largest number of an integer dtype."""
    with torch.no_grad():
        if tensor.dtype.is_floating_point:
            tensor.fill_(torch.nan)
        elif tensor.dtype is not torch.bool and not tensor.dtype.is_complex:
            tensor.fill_(torch.iinfo(tensor.dtype).max)
    return tensor


def poisoning(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def allocate_and_poison(*arguments: Any, **options: Any) -> Tensor:
        return poison(allocate(*arguments, **options))

    return allocate_and_poison


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fresh tensors hold NaN or an impossible index, those from the pool of large buffers too."""
    # A call that is kept from before would allocate as it did then.
    kept_calls = importlib.import_module("qlae_kernels.latent_quantize").cached_call
    for owner, names in (
        (torch, ("empty", "empty_like", "empty_strided")),
        (Tensor, ("new_empty", "new_empty_strided")),
    ):
        for name in names:
            monkeypatch.setattr(owner, name, poisoning(getattr(owner, name)))
    monkeypatch.setattr(latent_quantize_cpu, "_pooled_like", poisoning(latent_quantize_cpu._pooled_like))
    kept_calls.cache_clear()
    yield
    kept_calls.cache_clear()
