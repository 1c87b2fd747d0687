"""Pallas kernels, each beside its plain jax.numpy reference; importing this package imports no Pallas."""

MIN_RANGE = 1e-8  # a range that is narrower counts as this wide
