"""Training methods by name. A new method is one file and one line in `METHODS`."""

from collections.abc import Callable

from qlae.config import TrainConfig
from qlae.errors import UserError
from qlae.methods.base import Method
from qlae.methods.qlae import QLAE

__all__ = ["METHODS", "Method", "build_method"]

Factory = Callable[[TrainConfig, tuple[int, int, int]], Method]

METHODS: dict[str, Factory] = {
    "qlae": QLAE.from_config,
}


def build_method(config: TrainConfig, image_shape: tuple[int, int, int]) -> Method:
    """A newly initialised method on the CPU; the values come from torch's global generator.

    Args:
        config: with `num_latents` decided.
        image_shape: (3, height, width) in pixels.

    Raises:
        UserError: for an unknown method or network, and for an image size that the network does not take.
    """
    if config.method not in METHODS:
        raise UserError(f"unknown method {config.method!r}: choose one of {', '.join(METHODS)}")
    return METHODS[config.method](config, image_shape)
