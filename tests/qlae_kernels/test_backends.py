"""Which backends there are, how one is chosen, and what a missing one says."""

import ast
import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from backend_variants import ONCE, VARIANTS

from qlae_kernels import available_backends, latent_quantize, latent_quantize_cpu
from qlae_kernels.backends import BACKENDS, unavailable_reason

QUANTIZE = "latent_quantize(torch.zeros(4, 3), torch.zeros(3, 5){})"


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run lines of Python in a new process, with the package imported."""
    lines = f"import torch\nfrom qlae_kernels import *\n{code}"
    clean = {name: value for name, value in os.environ.items() if not name.startswith("QLAE_")}
    return subprocess.run(
        [sys.executable, "-P", "-c", lines], capture_output=True, text=True, env=clean | environment, check=False
    )


def test_the_compiled_kernels_are_there_and_come_first() -> None:
    # Every installation builds them; without them most of these tests would not run.
    names = available_backends()
    assert names[0] == "cpu"
    assert names[-1] == "reference"
    assert list(names[1:-1]) == [name for name in ("cuda", "triton") if name in names]


def test_a_gpu_is_served_by_kernels_and_only_where_there_is_one() -> None:
    if not torch.cuda.is_available():
        # Triton's interpreter needs no GPU.
        assert set(available_backends()) - {"triton"} == {"cpu", "reference"}
        assert "triton" not in available_backends() or os.environ.get("TRITON_INTERPRET") == "1"
    elif importlib.util.find_spec("triton") is not None:
        assert "triton" in available_backends()


# What runs a backend's kernels on the CPU.
STAND_INS = {"cuda": "the backend cuda-emulated", "triton": "triton's interpreter, where triton is installed"}


@pytest.mark.parametrize("name", BACKENDS)
def test_the_shared_tests_run_on_every_backend(name: str) -> None:
    reason = unavailable_reason(name)
    if reason is not None:
        pytest.skip(f"needs the backend {name}: {reason}. Its kernels are run by {STAND_INS[name]}")
    assert name in ONCE
    assert name in {variant.split("-")[0] for variant in VARIANTS}


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_a_named_backend_that_is_absent_says_why_and_what_to_do(name: str) -> None:
    reason = unavailable_reason(name)
    if reason is None:
        pytest.skip(f"needs a machine without the backend {name}; it is available here")
    missing, _, remedy = reason.partition("; ")
    assert missing
    assert any(verb in remedy for verb in ("install", "build", "set ", "use ")), reason
    with pytest.raises(RuntimeError) as caught:
        latent_quantize(torch.zeros(4, 3), torch.zeros(3, 5), backend=name)
    assert f"'{name}' is not available: {reason}" in str(caught.value)


@pytest.mark.parametrize("name", [name for name in ("triton", "cuda") if name in available_backends()])
def test_a_gpu_backend_refuses_other_devices(name: str) -> None:
    with pytest.raises(RuntimeError, match=rf"'{name}'.*meta.*'auto'"):
        latent_quantize(torch.zeros(4, 3, device="meta"), torch.zeros(3, 5, device="meta"), backend=name)


def test_the_cpu_backend_refuses_other_devices() -> None:
    with pytest.raises(RuntimeError, match=r"'cpu'.*meta.*'auto'"):
        latent_quantize(torch.zeros(4, 3, device="meta"), torch.zeros(3, 5, device="meta"), backend="cpu")


def test_the_environment_chooses_in_place_of_auto_only() -> None:
    code = f"""
from qlae_kernels import latent_quantize_cpu, latent_quantize_reference
for module in (latent_quantize_cpu, latent_quantize_reference):
    def prepare(problem, original=module.prepare, name=module.__name__):
        print(name.rsplit("_", 1)[1])
        return original(problem)
    module.prepare = prepare
{QUANTIZE.format("")}
{QUANTIZE.format(", backend='cpu'")}
FusedLatentQuantizer(3, 5)(torch.zeros(6, 3))
"""
    run = python(code, QLAE_BACKEND="reference")
    assert run.stdout.split() == ["reference", "cpu", "reference"], run.stderr
    run = python(code)
    assert set(run.stdout.split()) == {"cpu"}, run.stderr


@pytest.mark.parametrize(
    ("value", "error", "named"),
    [
        ("numpy", "ValueError", ["QLAE_BACKEND", "'numpy'", "reference"]),
        ("cuda", "RuntimeError", ["cuda", "not on cpu" if "cuda" in available_backends() else "not available"]),
    ],
)
def test_a_wrong_environment_is_an_error_at_the_first_call(value: str, error: str, named: list[str]) -> None:
    run = python(f"print('imported')\n{QUANTIZE.format('')}", QLAE_BACKEND=value)
    assert run.returncode == 1
    assert run.stdout == "imported\n"
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith(error)
    for word in named:
        assert word in last


def test_the_environment_chooses_the_instruction_set() -> None:
    show = "from qlae_kernels import latent_quantize_cpu as cpu\nprint(cpu.active_instruction_set())"
    assert python(show, QLAE_CPU_INSTRUCTION_SET="baseline").stdout == "baseline\n"
    assert python(show).stdout == f"{latent_quantize_cpu.instruction_sets()[-1]}\n"


def test_an_unknown_instruction_set_in_the_environment_is_named() -> None:
    run = python(QUANTIZE.format(""), QLAE_CPU_INSTRUCTION_SET="sse9")
    assert run.returncode == 1
    last = run.stderr.strip().splitlines()[-1]
    for word in ("ValueError", "QLAE_CPU_INSTRUCTION_SET", "'sse9'", "baseline"):
        assert word in last


WITHOUT_NATIVE = """
import runpy, sys
sys.modules["qlae_kernels._native"] = None
import torch
from qlae_kernels import available_backends, latent_quantize
print(available_backends())
print(latent_quantize(torch.zeros(4, 3), torch.ones(3, 5)).loss.item())
try:
    latent_quantize(torch.zeros(4, 3), torch.ones(3, 5), backend="cpu")
except RuntimeError as error:
    print(error)
runpy.run_module("qlae_kernels", run_name="__main__")
"""


def test_without_the_compiled_module_the_reference_serves_and_says_so() -> None:
    run = subprocess.run([sys.executable, "-P", "-c", WITHOUT_NATIVE], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    names, loss, error, *listing = run.stdout.splitlines()
    assert "cpu" not in ast.literal_eval(names)
    assert ast.literal_eval(names)[-1] == "reference"
    assert float(loss) == pytest.approx(0.02)
    assert "'cpu' is not available" in error
    assert "pip install" in error
    (cpu_line,) = [line for line in listing if line.split()[:1] == ["cpu"]]
    assert "not available" in cpu_line
    assert "pip install" in cpu_line


def test_the_module_prints_every_backend_and_why_one_is_absent() -> None:
    run = subprocess.run([sys.executable, "-P", "-m", "qlae_kernels"], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    lines = {line.split()[0]: line for line in run.stdout.splitlines() if line.strip()}
    for name in available_backends():
        assert "not available" not in lines[name]
        assert "available" in lines[name]
    for name in {"triton", "cuda"} - set(available_backends()):
        assert "not available: " in lines[name]
    for name in latent_quantize_cpu.instruction_sets():
        assert name in run.stdout
