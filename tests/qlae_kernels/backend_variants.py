"""Which backends a test runs on: each in all its variants, or each once."""

import pytest

from qlae_kernels import available_backends, latent_quantize_cpu
from qlae_kernels.backends import BACKENDS

# The CUDA kernels compiled for the CPU.
EMULATED = "cuda-emulated"
INSTRUCTION_SETS = latent_quantize_cpu.instruction_sets() if "cpu" in available_backends() else ()

ONCE = [*available_backends()]
# In triton's interpreter only triton is of interest.
if "cpu" not in BACKENDS["triton"].DEVICE_TYPES:
    ONCE.append(EMULATED)
# The kernels sort the codebook for large inputs only; sorted from the first sample on, small ones show every search.
VARIANTS = [name for name in ONCE if name != "cpu"] + [
    f"cpu-{name}{sorting}" for name in INSTRUCTION_SETS for sorting in ("", "-sorted")
]

# For what does not depend on how `cpu` searches: it takes its best instruction set, as it does by itself.
each_backend = pytest.mark.parametrize("backend", ONCE, indirect=True)
