"""The same formula in JAX, compiled for the CPU."""

from __future__ import annotations

import os
from typing import Any

import torch
from latent_quantize_cases import COMMITMENT_WEIGHT, QUANTIZATION_WEIGHT, Direction, Inputs, Results
from measurement import Task
from torch import Tensor

# XLA makes as many threads as this variable says when it starts, and one per core without it.
os.environ["NPROC"] = str(torch.get_num_threads())

import jax
import jax.numpy as jnp

jax.config.update("jax_platforms", "cpu")


def jax_latent_quantize(z: jax.Array, codebook: jax.Array) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """((quantized, loss), indices) of z [N, D] and codebook [D, K]."""
    latents = z.astype(codebook.dtype)
    indices = jnp.abs(latents[..., None] - codebook).argmin(-1)
    codes = codebook[jnp.arange(codebook.shape[0]), indices]
    quantization_loss = jnp.square(codes - jax.lax.stop_gradient(latents)).mean()
    commitment_loss = jnp.square(latents - jax.lax.stop_gradient(codes)).mean()
    loss = QUANTIZATION_WEIGHT * quantization_loss + COMMITMENT_WEIGHT * commitment_loss
    quantized = (latents + jax.lax.stop_gradient(codes - latents)).astype(z.dtype)
    return (quantized, loss), indices


@jax.jit
def forward(z: jax.Array, codebook: jax.Array) -> Any:
    return jax_latent_quantize(z, codebook)


@jax.jit
def forward_with_pullback(z: jax.Array, codebook: jax.Array) -> Any:
    return jax.vjp(jax_latent_quantize, z, codebook, has_aux=True)


@jax.jit
def pull_back(pullback: Any, grad_quantized: jax.Array) -> Any:
    return pullback((grad_quantized, jnp.ones((), jnp.float32)))


@jax.jit
def forward_backward(z: jax.Array, codebook: jax.Array, grad_quantized: jax.Array) -> Any:
    outputs, pullback, indices = jax.vjp(jax_latent_quantize, z, codebook, has_aux=True)
    return outputs, indices, pullback((grad_quantized, jnp.ones((), jnp.float32)))


class JaxContender:
    """`jax.jit` of the formula and its gradient; a call ends when its results are there."""

    note: str | None = None

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self.z = to_jax(inputs.z)
        self.codebook = to_jax(inputs.codebook)
        self.grad_quantized = to_jax(inputs.grad_quantized)

    def task(self, direction: Direction) -> Task:
        if direction == "forward":
            return Task(lambda: jax.block_until_ready(forward(self.z, self.codebook)))
        if direction == "backward":
            return Task(self.backward, self.forward_with_pullback)
        return Task(self.forward_backward)

    def forward_with_pullback(self) -> Any:
        return jax.block_until_ready(forward_with_pullback(self.z, self.codebook))[1]

    def backward(self, pullback: Any) -> Any:
        return jax.block_until_ready(pull_back(pullback, self.grad_quantized))

    def forward_backward(self) -> Any:
        return jax.block_until_ready(forward_backward(self.z, self.codebook, self.grad_quantized))

    def results(self) -> Results:
        (quantized, loss), indices, (grad_z, grad_codebook) = self.forward_backward()
        return Results(*map(to_torch, (quantized, indices, loss, grad_z, grad_codebook)))

    def release(self) -> None:
        """Results live only as long as the caller keeps them."""


def to_jax(tensor: Tensor) -> jax.Array:
    """A copy of a tensor, in its dtype."""
    if tensor.dtype is torch.bfloat16:
        return jnp.asarray(tensor.float().numpy()).astype(jnp.bfloat16)
    return jnp.array(tensor.numpy(), copy=True)


def to_torch(array: jax.Array) -> Tensor:
    """A copy of an array; bfloat16 becomes float32 without loss."""
    if array.dtype == jnp.bfloat16:
        array = array.astype(jnp.float32)
    return torch.from_numpy(jax.device_get(array).copy())
