"""AlexNet in JAX and Flax: the network, its data, its training."""
