"""Kinds of latents: what lies between an encoder and a decoder. A new kind is one file with a `Latent`."""

from qlae.latents.base import Latent, SampledLatent
from qlae.latents.continuous import ContinuousLatent, NonnegativeLatent, UniformLatent
from qlae.latents.gaussian import GaussianLatent, TotalCorrelationLatent
from qlae.latents.quantized import QuantizedLatent
from qlae.latents.vector_quantized import VectorQuantizedLatent

__all__ = [
    "ContinuousLatent",
    "GaussianLatent",
    "Latent",
    "NonnegativeLatent",
    "QuantizedLatent",
    "SampledLatent",
    "TotalCorrelationLatent",
    "UniformLatent",
    "VectorQuantizedLatent",
]
