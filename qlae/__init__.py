"""Quantized-latent autoencoders: training, data, metrics and the `qlae` command."""
