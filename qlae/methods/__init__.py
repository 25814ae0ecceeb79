"""Training methods by name. A new method is one file and one line in `METHODS`; docs/your-own-method.md shows it."""

from dataclasses import replace

from qlae.config import METHOD_OPTIONS, TrainConfig, option
from qlae.errors import UserError
from qlae.methods.ae import AE
from qlae.methods.base import Method
from qlae.methods.bioae import BioAE
from qlae.methods.fsq import FSQ
from qlae.methods.infowgan_gp import InfoWGANGP
from qlae.methods.qlae import QLAE
from qlae.methods.qlinfowgan_gp import QLInfoWGANGP
from qlae.methods.tcvae import TCVAE
from qlae.methods.vae import VAE
from qlae.methods.vqvae import VQVAE

__all__ = ["METHODS", "Method", "build_method", "with_method_options"]

METHODS: dict[str, type[Method]] = {
    "qlae": QLAE,
    "qlinfowgan-gp": QLInfoWGANGP,
    "infowgan-gp": InfoWGANGP,
    "ae": AE,
    "vae": VAE,
    "tcvae": TCVAE,
    "bioae": BioAE,
    "vqvae": VQVAE,
    "fsq": FSQ,
}


def build_method(config: TrainConfig, image_shape: tuple[int, int, int]) -> Method:
    """A newly initialised method on the CPU; the values come from torch's global generator.

    Args:
        config: with `num_latents` decided.
        image_shape: (3, height, width) in pixels.

    Raises:
        UserError: for an unknown method or network, for an option that is another method's, and for an image size that
            the network does not take.
    """
    config = with_method_options(config)
    return METHODS[config.method].from_config(config, image_shape)


def with_method_options(config: TrainConfig) -> TrainConfig:
    """The configuration with the method's own value for each of its options that has none.

    Raises:
        UserError: for an unknown method, and for an option that is another method's.
    """
    if config.method not in METHODS:
        raise UserError(f"unknown method {config.method!r}: choose one of {', '.join(METHODS)}")
    own = METHODS[config.method].options
    for name in METHOD_OPTIONS:
        value = getattr(config, name)
        if value is not None and name not in own:
            users = ", ".join(method for method, each in METHODS.items() if name in each.options)
            raise UserError(
                f"{option(name)} {value}: the method {config.method} has no such option, leave it out; "
                f"methods that have it: {users}"
            )
    return replace(config, **{name: value for name, value in own.items() if getattr(config, name) is None})
