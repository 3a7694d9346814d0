"""CIFAR-10 by the 2012 program's layers-18pct.cfg: 18 % error without augmentation."""

from ml_collections import ConfigDict

from alexnet_jax.config import load_config


def get_config() -> ConfigDict:
    """Returns the config."""
    c = load_config("cifar10_80sec")
    c.model.variant = "cifar_18pct"
    c.num_epochs = 140
    c.optimizer.layer_decays = (("fc4", 1.0),)  # wc of fc10
    # A tenth of the rate after 120 epochs, and a hundredth after 10 more.
    c.schedule.kind = "steps"
    c.schedule.step_epochs = (120.0, 130.0)
    return c
