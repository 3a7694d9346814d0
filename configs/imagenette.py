"""Imagenette: ten easy classes of ImageNet, 9,469 photographs; AlexNet at full size in an hour."""

from ml_collections import ConfigDict

from alexnet_jax.config import default_config


def get_config() -> ConfigDict:
    """Returns the config: the paper's network and augmentation, He initialization."""
    c = default_config()
    c.dataset = "imagenette/320px-v2"  # tfds downloads it (325 MiB)
    c.eval_split = "validation"

    c.model.variant = "paper"
    c.model.num_classes = 10
    c.model.init = "he"  # from the paper's initialization the loss stays at ln 10 for long
    c.model.hidden_bias = 0.0
    c.augment.pixel_scale = 1 / 64

    c.batch_size = 64
    c.num_epochs = 60
    c.schedule.kind = "cosine"
    c.schedule.warmup_epochs = 1.0
    return c
