"""Fine-tuning: a trained network learns your photographs, PATH/train/CLASS/*.jpg and PATH/val/….

    python train.py --config configs/finetune.py --config.dataset=folder:PATH \
        --config.model.num_classes=N --config.init_from=runs/torchvision

docs/finetune.md explains how to get such a network and what each field does.
"""

from ml_collections import ConfigDict

from alexnet_jax.config import default_config

PIXEL_STD = (0.229, 0.224, 0.225)  # of ImageNet; torchvision divides pixels from 0 to 1 by it


def get_config() -> ConfigDict:
    """Returns the config, for the weights of torchvision's alexnet.

    For another network, set the fields of its input to its values. A command that does not is
    refused with the values to set.
    """
    c = default_config()
    c.dataset = "folder:photographs"
    c.train_split = "train"
    c.eval_split = "val"

    # The workdir of the network to start from. Its mean is used here too. fc8 is new, because the
    # classes differ.
    c.init_from = "runs/torchvision"
    c.model.num_classes = 10

    # The input that the network was trained on.
    c.model.variant = "owt"
    c.augment.crop_size = 224
    c.augment.mean = "channel"
    c.augment.channel_scale = tuple(1 / (255 * std) for std in PIXEL_STD)

    # Edges and colors are similar in all photographs, so these layers stay fixed, which also saves
    # their gradients.
    c.freeze = ("conv1", "conv2")
    # fc8 alone starts from random weights, so it needs a higher rate.
    c.learning_rate = 0.001
    c.optimizer.layer_rates = (("fc8", 10.0),)

    c.batch_size = 64
    c.num_epochs = 30
    c.schedule.kind = "cosine"
    return c
