"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, by a C++ program of tests/native."""

import os
import subprocess
import sys
from pathlib import Path

import pybind11

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = "check_latent_quantize_cpu"


def test_kernels_touch_only_what_is_theirs(tmp_path: Path) -> None:
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
