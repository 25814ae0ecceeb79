"""`python -m qlae_kernels`: which backends can serve here and, for each that cannot, why and what to do."""

from __future__ import annotations

import torch

from qlae_kernels import __version__, latent_quantize_cpu
from qlae_kernels.backends import BACKENDS, available_backends, unavailable_reason


def main() -> None:
    """Print versions, backends and the processor's instruction sets."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    print(f"qlae_kernels {__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads, GPU: {gpu}")
    for name in BACKENDS:
        reason = unavailable_reason(name)
        print(f"  {name:<10} {'available' if reason is None else 'not available: ' + reason}")
    if "cpu" in available_backends():
        active = latent_quantize_cpu.active_instruction_set()
        others = ", ".join(latent_quantize_cpu.instruction_sets())
        print(f"  instruction set {active} of {others}; QLAE_CPU_INSTRUCTION_SET chooses another")


if __name__ == "__main__":
    main()
