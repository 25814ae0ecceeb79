"""Builds the CUDA kernels for the CPU (tests/native/cuda_emulation.h) offered as the backend `cuda-emulated`."""

import functools
import importlib.util
import os
import shutil
import subprocess
import sysconfig
import types
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pybind11
from backend_variants import EMULATED

from qlae_kernels import backends, latent_quantize_cuda

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc"
NATIVE = ROOT / "tests" / "native"
VALUE_TYPES = ("Float32", "Float64", "Float16", "BFloat16")
# With -ffp-contract=off the compiler fuses no product with a sum that the kernels do not fuse themselves.
FLAGS = [
    "-std=c++20",
    "-O1",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    "-ffp-contract=off",
    "-pthread",
]


def compiler() -> list[str]:
    return os.environ.get("CXX", "").split() or [shutil.which("g++") or "c++"]


def value_type_flags(value_type: str) -> tuple[str, str]:
    """What the kernels of one value type are compiled with."""
    return f"-DQLAE_VALUE_TYPE=k{value_type}", f"-DQLAE_KERNELS=k{value_type}Kernels"


def checked_run(command: list[object]) -> subprocess.CompletedProcess[str]:
    ended = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, f"{command}\n{ended.stdout}{ended.stderr}"
    return ended


def build(folder: Path) -> types.ModuleType:
    """Compile the module `_emulated_cuda` into `folder` and import it."""
    as_cpp = ("-x", "c++")
    units = {
        f"kernels_{value_type}": (*as_cpp, *value_type_flags(value_type), SOURCES / "latent_quantize_cuda_kernels.cu")
        for value_type in VALUE_TYPES
    }
    units["launcher"] = (*as_cpp, SOURCES / "latent_quantize_cuda.cu")
    units["plan"] = (SOURCES / "latent_quantize_cuda_plan.cpp",)
    python = {sysconfig.get_path("include"), sysconfig.get_path("platinclude")}
    includes = [f"-isystem{path}" for path in (pybind11.get_include(), *sorted(python))]
    units["module"] = (*includes, NATIVE / "emulated_cuda.cpp")

    def compile_unit(name: str) -> Path:
        target = folder / f"{name}.o"
        checked_run(
            [*compiler(), *FLAGS, f"-I{SOURCES}", f"-I{NATIVE}", *units[name][:-1], "-c", units[name][-1], "-o", target]
        )
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_unit, units))
    library = folder / f"_emulated_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    checked_run([*compiler(), "-shared", "-pthread", "-o", library, *objects])
    spec = importlib.util.spec_from_file_location("_emulated_cuda", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def forget_calls() -> None:
    """Drop the calls that were kept with the choices of before."""
    importlib.import_module("qlae_kernels.latent_quantize").cached_call.cache_clear()


@contextmanager
def registered(module: types.ModuleType) -> Iterator[str]:
    """The name of the backend that runs the kernels of `module` on CPU tensors; it exists inside the block only."""
    names = backends.NAMES
    backends.BACKENDS[EMULATED] = types.SimpleNamespace(
        DEVICE_TYPES=("cpu",),
        unavailable_reason=lambda: None,
        prepare=functools.partial(latent_quantize_cuda.prepare_with, module),
    )
    backends.NAMES = ("auto", *backends.BACKENDS)
    try:
        yield EMULATED
    finally:
        del backends.BACKENDS[EMULATED]
        backends.NAMES = names
        forget_calls()


@contextmanager
def choosing(module: types.ModuleType, search: int, bins: int) -> Iterator[None]:
    """Inside the block the launcher takes this search and these bins; 0 leaves the choice to its plan."""
    module.set_cuda_choices(search, bins)
    forget_calls()
    try:
        yield
    finally:
        module.set_cuda_choices(0, 0)
        forget_calls()
