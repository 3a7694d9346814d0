"""CIFAR-10 by the smallest network of the 2012 program: 26 % error, in 80 seconds on a GPU of 2011.

Source: layers-cifar/layers-80sec.cfg and layer-params-80sec.cfg of the released program,
github.com/computerhistory/AlexNet-Source-Code. The other configs for CIFAR-10 start from this one.
"""

from ml_collections import ConfigDict

from alexnet_jax.config import default_config


def get_config() -> ConfigDict:
    """Returns the config."""
    c = default_config()
    c.dataset = "cifar10"  # tfds downloads it (160 MiB)
    c.eval_split = "test"
    c.image_size = 32

    c.model.variant = "cifar_80sec"
    c.model.num_classes = 10
    c.model.init = "paper"  # N(0, std²), each layer with its own std

    # No augmentation: neither crops nor mirror images.
    c.augment.crop_size = 32
    c.augment.flip = False
    c.augment.mean = "image"
    c.augment.color_noise = 0.0

    c.batch_size = 128  # --mini
    c.num_epochs = 25
    c.learning_rate = 0.001  # epsW
    c.optimizer.bias_learning_rate = 2.0  # epsB = 0.002
    c.optimizer.momentum = 0.9
    c.optimizer.weight_decay = 0.004  # wc of the convolutions
    c.optimizer.layer_decays = (("fc4", 0.03), ("fc5", 0.03))
    c.schedule.kind = "constant"
    return c
