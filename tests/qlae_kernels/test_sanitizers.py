"""The kernels under sanitizers, by C++ programs of tests/native; those of CUDA run on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pybind11
import pytest
from emulated_cuda import NATIVE, SOURCES, checked_run, compiler, value_type_flags

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = "check_latent_quantize_cpu"
CUDA_SANITIZERS = {
    "address": ("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "thread": ("-fsanitize=thread", "-DQLAE_EMULATE_WITH_THREADS"),
}


def test_cpu_kernels_touch_only_what_is_theirs(tmp_path: Path) -> None:
    configure = [
        "cmake",
        *("-S", ROOT, "-B", tmp_path, "-G", "Ninja"),
        "-DQLAE_SANITIZE=ON",
        "-DQLAE_WERROR=ON",
        # Optimised a little: the program would take a minute without, and the compiler one with more.
        "-DCMAKE_BUILD_TYPE=Debug",
        "-DCMAKE_CXX_FLAGS_DEBUG=-Og -g1",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    ]
    # cmake and ninja may be installed beside this interpreter only; memory kept until the process ends is no leak.
    environment = os.environ | {
        "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    for command in (configure, ["cmake", "--build", tmp_path, "--target", PROGRAM]):
        build = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert build.returncode == 0, build.stdout + build.stderr
    run = subprocess.run([tmp_path / PROGRAM], capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.startswith("passed: baseline")


@pytest.mark.parametrize("sanitizer", CUDA_SANITIZERS)
def test_cuda_kernels_touch_only_what_is_theirs_and_wait_for_each_other(tmp_path: Path, sanitizer: str) -> None:
    flags = ("-std=c++20", "-O1", "-g1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-ffp-contract=off")
    flags += ("-pthread", f"-I{SOURCES}", f"-I{NATIVE}", *CUDA_SANITIZERS[sanitizer])
    sources = {
        SOURCES / "latent_quantize_cuda_kernels.cu": ("-x", "c++", *value_type_flags("Float32")),
        SOURCES / "latent_quantize_cuda.cu": ("-x", "c++"),
        SOURCES / "latent_quantize_cuda_plan.cpp": (),
        NATIVE / "check_latent_quantize_cuda.cpp": (),
    }
    objects = []
    for source, language in sources.items():
        objects.append(tmp_path / f"{source.stem}.o")
        checked_run([*compiler(), *flags, *language, "-c", source, "-o", objects[-1]])
    program = tmp_path / "check"
    checked_run([*compiler(), *flags, "-o", program, *objects])
    # ThreadSanitizer cannot place its memory where addresses are randomised over more bits than it knows.
    run = subprocess.run(
        ["setarch", "-R", program],
        capture_output=True,
        text=True,
        env=os.environ | {"TSAN_OPTIONS": "halt_on_error=1"},
        check=False,
    )
    assert (run.returncode, run.stdout) == (0, "passed\n"), run.stdout + run.stderr
