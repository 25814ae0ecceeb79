"""Peak memory of one forward and backward pass, measured in a process of its own (Linux).

    python benchmarks/latent_quantize_memory.py CONTENDER BATCH LATENTS LEVELS

prints a number of bytes: the process's largest resident size during one call, less its size just before it. Inputs
are made and one call is made before that; the memory it left behind is given back to the system first.
"""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
from pathlib import Path

import torch
from latent_quantize_cases import Case, make_inputs
from latent_quantize_peers import CONTENDERS

from qlae_kernels import latent_quantize_cpu

STATUS = Path("/proc/self/status")
# Writing 5 here sets the high-water mark to the present size.
CLEAR = Path("/proc/self/clear_refs")


def unavailable_reason() -> str | None:
    """Why memory cannot be measured here; None if it can."""
    return None if STATUS.exists() and os.access(CLEAR, os.W_OK) else "needs Linux's /proc/self/clear_refs"


def peak_memory(name: str, case: Case) -> int:
    """Bytes that one call takes at most, of float32 inputs, measured in a new process."""
    arguments = [name, str(case.batch), str(case.num_latents), str(case.levels)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"measuring the memory of {name} on {case} failed:\n{done.stderr}")
    return int(done.stdout)


def measure(name: str, case: Case) -> int:
    """As `peak_memory`, in this process."""
    contender = CONTENDERS[name](make_inputs(case))
    task = contender.task("forward + backward")
    task.run()
    contender.release()
    give_memory_back()
    CLEAR.write_text("5")
    before = _status_bytes("VmRSS")
    # Held until the mark is read, as a training step would hold it.
    outputs = task.run()
    peak = _status_bytes("VmHWM")
    del outputs
    return peak - before


def give_memory_back() -> None:
    """Return freed memory to the system: the kernels' pool and the C library's free lists."""
    gc.collect()
    if latent_quantize_cpu.unavailable_reason() is None:
        latent_quantize_cpu.empty_cache()
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)


def _status_bytes(field: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field + ":"))
    return 1024 * int(line.split()[1])


if __name__ == "__main__":
    contender_name, *sizes = sys.argv[1:]
    print(measure(contender_name, Case(*map(int, sizes))))
