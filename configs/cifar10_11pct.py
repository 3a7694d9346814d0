"""CIFAR-10 by the 2012 program's layers-conv-local-11pct.cfg: 11 % error (paper §3.3)."""

from ml_collections import ConfigDict

from alexnet_jax.config import load_config


def get_config() -> ConfigDict:
    """Returns the config."""
    c = load_config("cifar10_13pct")
    c.model.variant = "cifar_11pct"
    c.optimizer.layer_decays = (("conv1", 0.0), ("conv2", 0.0), ("fc5", 0.01))
    # The program: 350 epochs on four of five parts, 150 on all, then 10 at each lower rate.
    c.num_epochs = 520
    c.schedule.step_epochs = (500.0, 510.0)
    return c
