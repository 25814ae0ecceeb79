"""Which backends there are, which can serve, and which one serves a call."""

from __future__ import annotations

import os

from qlae_kernels import (
    latent_quantize_cpu,
    latent_quantize_cuda,
    latent_quantize_reference,
    latent_quantize_triton,
)
from qlae_kernels.problem import Backend

# In the order in which `auto` tries them.
BACKENDS: dict[str, Backend] = {
    "cpu": latent_quantize_cpu,
    "cuda": latent_quantize_cuda,
    "triton": latent_quantize_triton,
    "reference": latent_quantize_reference,
}

NAMES: tuple[str, ...] = ("auto", *BACKENDS)

# Read once, at import: the environment's choice replaces `auto`, never a backend named in a call.
_ENVIRONMENT_BACKEND = os.environ.get("QLAE_BACKEND") or "auto"


def unavailable_reason(name: str) -> str | None:
    """Why the named backend cannot serve on this machine, with the remedy; None if it can."""
    return BACKENDS[name].unavailable_reason()


def available_backends() -> tuple[str, ...]:
    """The names of the backends that can serve here and now, in the order in which `auto` prefers them."""
    return tuple(name for name in BACKENDS if unavailable_reason(name) is None)


def select_backend(name: str, device_type: str) -> Backend:
    """The backend that serves `device_type` under `name`.

    Raises ValueError for a name that does not exist and RuntimeError, with the reason and the remedy, for a backend
    that is not there or does not serve the device. `auto` takes the first that can serve.
    """
    check_name(name)
    if name == "auto" and _ENVIRONMENT_BACKEND != "auto":
        name = _ENVIRONMENT_BACKEND
        check_name(name, " (from the environment variable QLAE_BACKEND)")
    if name == "auto":
        serving = (BACKENDS[n] for n in available_backends() if device_type in BACKENDS[n].DEVICE_TYPES)
        # Plain PyTorch serves devices that nobody has named yet, too.
        return next(serving, latent_quantize_reference)
    reason = unavailable_reason(name)
    if reason is not None:
        raise RuntimeError(f"backend {name!r} is not available: {reason}")
    backend = BACKENDS[name]
    if device_type not in backend.DEVICE_TYPES:
        raise RuntimeError(
            f"backend {name!r} serves tensors on {', '.join(backend.DEVICE_TYPES)}, not on {device_type}; "
            "move the tensors or use backend='auto'"
        )
    return backend


def check_name(name: str, origin: str = "") -> None:
    """Raise ValueError unless `name` is a backend's name or `auto`."""
    if name not in NAMES:
        raise ValueError(f"backend must be one of {', '.join(NAMES)}; got {name!r}{origin}")
