"""The private names of PyTorch: there in this release, used in one file, and named where a release lacks one."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils import _pytree

ROOT = Path(__file__).parents[2]
for_gpus = pytest.mark.skipif(
    torch.version.cuda is None and torch.version.hip is None, reason="needs a build of torch for GPUs"
)


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (torch._C, "_are_functorch_transforms_active"),
        (torch._C, "_len_torch_dispatch_stack"),
        (torch._C, "_is_tracing"),
        (torch._C, "_dispatch_key_parse"),
        (torch._C, "_dispatch_tls_is_dispatch_key_included"),
        pytest.param(torch._C, "_cuda_getCurrentRawStream", marks=for_gpus),
        (_pytree, "_register_namedtuple"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_this_release_has_the_private_name(owner: object, name: str) -> None:
    assert hasattr(owner, name), (
        f"torch {torch.__version__} has no {owner.__name__}.{name}; qlae_kernels/torch_internals.py needs another way"
    )


def test_private_names_are_used_in_one_file() -> None:
    # torch._C._name, torch.utils._name, from torch... import _name; not __version__.
    private = re.compile(r"\btorch(\.\w+)*\._(?!_)|^\s*from torch[\w.]* import .*\b_(?!_)", re.MULTILINE)
    files = [path for package in ("qlae", "qlae_kernels") for path in (ROOT / package).rglob("*.py")]
    users = [str(path.relative_to(ROOT)) for path in files if private.search(path.read_text())]
    assert users == ["qlae_kernels/torch_internals.py"]


def without(name: str, code: str) -> subprocess.CompletedProcess[str]:
    """Run lines of Python in a new process where PyTorch lacks `name` when the package is imported."""
    lines = f"import torch\nfrom torch.utils import _pytree\ndel {name}\nimport qlae_kernels\nprint('imported')\n{code}"
    return subprocess.run([sys.executable, "-P", "-c", lines], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", ["_are_functorch_transforms_active", "_len_torch_dispatch_stack"])
def test_a_call_names_what_this_release_lacks(name: str) -> None:
    run = without(f"torch._C.{name}", "qlae_kernels.latent_quantize(torch.zeros(4, 3), torch.zeros(3, 5))")
    assert run.stdout == "imported\n"
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith(f"RuntimeError: this call needs torch._C.{name}")
    assert torch.__version__ in last


@for_gpus
def test_a_gpu_stream_that_this_release_lacks_is_named_when_it_is_asked_for() -> None:
    code = "from qlae_kernels.torch_internals import current_raw_stream\ncurrent_raw_stream(0)"
    name = "torch._C._cuda_getCurrentRawStream"
    run = without(name, code)
    assert run.stdout == "imported\n"
    assert run.stderr.strip().splitlines()[-1].startswith(f"RuntimeError: this call needs {name}")


def test_without_a_way_to_register_named_tuples_a_warning_says_what_is_lost() -> None:
    code = "print(qlae_kernels.latent_quantize(torch.zeros(4, 3), torch.ones(3, 5)).loss.item())"
    run = without("_pytree._register_namedtuple", code)
    assert run.returncode == 0, run.stderr
    imported, loss = run.stdout.splitlines()
    assert imported == "imported"
    # Weights 0.01 + 0.01, distance 1.
    assert float(loss) == pytest.approx(0.02)
    assert re.search(r"RuntimeWarning: torch .*_register_namedtuple.*torch\.export\.save.*Output", run.stderr)
