"""Your own photographs: PATH/train/CLASS/*.jpg and PATH/val/CLASS/*.jpg.

    python train.py --config configs/folder.py --config.dataset=folder:PATH \
        --config.model.num_classes=N
"""

from ml_collections import ConfigDict

from alexnet_jax.config import load_config


def get_config() -> ConfigDict:
    """Returns the config: the recipe of imagenette, for a folder of class folders."""
    c = load_config("imagenette")
    c.dataset = "folder:photographs"
    c.train_split = "train"
    c.eval_split = "val"
    return c
