"""AlexNet in JAX and Flax: the network, its data, its training."""

import os

# XLA logs what it also raises. It reads this when JAX is first imported.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
