"""CIFAR-10: 60,000 color images of 32×32 pixels in 10 classes, enlarged for AlexNet."""

from ml_collections import ConfigDict

from alexnet_jax.config import default_config


def get_config() -> ConfigDict:
    """Returns the config: half the filters, batch norm, He initialization."""
    c = default_config()
    c.dataset = "cifar10"  # tfds downloads it (160 MiB)
    c.eval_split = "test"
    c.image_size = 72
    c.augment.crop_size = 64
    c.augment.color_noise_scale = "eigenvalue"

    c.model.variant = "bn"
    c.model.num_classes = 10
    c.model.width = 0.5
    c.model.init = "he"
    c.model.hidden_bias = 0.0
    c.augment.pixel_scale = 1 / 64  # about unit variance

    c.batch_size = 128
    c.num_epochs = 60
    c.learning_rate = 0.02
    c.schedule.kind = "cosine"
    c.schedule.warmup_epochs = 1.0
    return c
