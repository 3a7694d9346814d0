"""Your own photographs: PATH/train/CLASS/*.jpg and PATH/val/CLASS/*.jpg.

    python train.py --config configs/folder.py --config.dataset=folder:PATH \
        --config.model.num_classes=N
"""

from ml_collections import ConfigDict

from alexnet_jax.config import default_config


def get_config() -> ConfigDict:
    """Returns the config: like imagenette, on a folder of class folders."""
    c = default_config()
    c.dataset = "folder:photographs"
    c.train_split = "train"
    c.eval_split = "val"

    c.model.variant = "paper"
    c.model.num_classes = 10
    c.model.init = "he"
    c.model.hidden_bias = 0.0
    c.augment.pixel_scale = 1 / 64

    c.batch_size = 64
    c.num_epochs = 60
    c.schedule.kind = "cosine"
    c.schedule.warmup_epochs = 1.0
    return c
