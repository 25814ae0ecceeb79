"""The emulation of CUDA that runs the GPU's kernels on the CPU: its answers, and the faults that it must show."""

import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "native" / "check_cuda_emulation.cpp"
# Optimised only where that saves more than it costs.
KINDS = {
    "fibers": ("-O1",),
    "ucontext": ("-O0", "-DQLAE_EMULATE_WITH_UCONTEXT"),
    "address": ("-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g1"),
    "thread": ("-O1", "-fsanitize=thread", "-DQLAE_EMULATE_WITH_THREADS", "-g1"),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory):
    """Run one kind of the program with an argument; built when first asked for."""
    folder = tmp_path_factory.mktemp("cuda_emulation")
    compiler = os.environ.get("CXX", "").split() or [shutil.which("g++") or "c++"]

    @cache
    def build(kind: str) -> Path:
        program = folder / kind
        flags = ("-std=c++20", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", "-pthread", *KINDS[kind])
        command = [*compiler, *flags, "-o", program, SOURCE]
        built = subprocess.run(command, capture_output=True, text=True, check=False)
        assert built.returncode == 0, built.stderr
        return program

    def run(kind: str, *arguments: str) -> tuple[int, str]:
        command = [build(kind), *arguments]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        if "unexpected memory mapping" in ended.stderr:
            # ThreadSanitizer cannot place its memory where addresses are randomised over more bits than it knows.
            ended = subprocess.run(
                ["setarch", "-R", *command], capture_output=True, text=True, timeout=120, check=False
            )
        return ended.returncode, ended.stdout + ended.stderr

    return run


@pytest.mark.parametrize("kind", KINDS)
def test_kernels_give_what_a_gpu_gives(run, kind: str) -> None:
    code, output = run(kind)
    assert (code, output) == (0, "passed\n")


@pytest.mark.parametrize("fault", ["missing-barrier", "missing-syncwarp", "halves-of-a-warp", "behind-atomic"])
def test_a_race_shows(run, fault: str) -> None:
    code, output = run("thread", fault)
    assert code != 0
    assert "ThreadSanitizer: data race" in output


@pytest.mark.parametrize("kernel", ["barrier", "syncwarp"])
def test_barriers_leave_no_race(run, kernel: str) -> None:
    code, output = run("thread", kernel)
    assert (code, output) == (0, "")


@pytest.mark.parametrize("fault", ["out-of-bounds", "before-bounds"])
def test_an_access_outside_shared_memory_shows(run, fault: str) -> None:
    code, output = run("address", fault)
    assert code != 0
    assert "AddressSanitizer: heap-buffer-overflow" in output
    assert "100-byte region" in output


@pytest.mark.parametrize("kind", ["fibers", "thread"])
@pytest.mark.parametrize(
    ("fault", "report"),
    [
        ("leave-before-barrier", "threads 5-5: left the kernel\n  threads 6-63: waits at __syncthreads"),
        ("different-barriers", "threads of a block meet at __syncthreads"),
        ("barrier-and-warp", "threads of a block meet at __syncthreads"),
        ("different-collectives", "lanes of a warp meet at"),
        ("different-masks", "deadlock\n  threads 0-0: waits at __syncwarp (mask 0x00000003)"),
        ("mask-without-caller", "the mask lacks the calling lane"),
    ],
)
def test_threads_that_never_meet_are_reported(run, kind: str, fault: str, report: str) -> None:
    code, output = run(kind, fault)
    assert code != 0
    assert report in output


@pytest.mark.parametrize(
    ("fault", "report"),
    [("wait-for-next-block", "__nanosleep without end"), ("unaligned-vector", "an address is not aligned")],
)
def test_what_a_gpu_may_refuse_is_reported(run, fault: str, report: str) -> None:
    code, output = run("fibers", fault)
    assert code != 0
    assert report in output
