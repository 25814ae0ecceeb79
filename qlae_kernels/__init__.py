"""A fused scalar latent quantizer for PyTorch: nearest code, gradients and losses in one pass."""

from torch.serialization import add_safe_globals

import qlae_kernels.latent_quantize_ops  # noqa: F401  (registers the ops, for exported programs that are loaded)
from qlae_kernels.backends import available_backends
from qlae_kernels.code_usage import CodeUsage
from qlae_kernels.latent_quantize import LatentQuantizerOutput, latent_quantize
from qlae_kernels.quantizer import FusedLatentQuantizer
from qlae_kernels.version import __version__

# torch.load(weights_only=True), its default, reads them.
add_safe_globals([CodeUsage, LatentQuantizerOutput])

__all__ = [
    "CodeUsage",
    "FusedLatentQuantizer",
    "LatentQuantizerOutput",
    "__version__",
    "available_backends",
    "latent_quantize",
]
