"""Training methods by name. docs/your-own-method.md shows what a new method takes."""

from qlae.config import TrainConfig, with_method_options
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
