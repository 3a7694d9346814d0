"""Fashion-MNIST: 70,000 gray images of clothes, 28×28 pixels, in 10 classes."""

from ml_collections import ConfigDict

from alexnet_jax.config import default_config


def get_config() -> ConfigDict:
    """Returns the config: like quickstart, with flips, on more data."""
    c = default_config()
    c.dataset = "fashion_mnist"  # tfds downloads it (30 MiB)
    c.eval_split = "test"
    c.image_size = 72
    c.augment.crop_size = 64
    c.augment.color_noise = 0.0  # the images are gray

    c.model.variant = "paper"
    c.model.num_classes = 10
    c.model.width = 0.25
    c.model.init = "he"
    c.model.hidden_bias = 0.0
    c.augment.pixel_scale = 1 / 64

    c.batch_size = 128
    c.num_epochs = 20
    c.schedule.kind = "cosine"
    return c
