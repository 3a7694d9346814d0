"""A trained network goes on to learn your own photographs: PATH/train/CLASS/*.jpg and PATH/val/….

    python train.py --config configs/finetune.py --config.dataset=folder:PATH \
        --config.model.num_classes=N --config.init_from=runs/torchvision

docs/finetune.md tells how to come by such a network, and what each field of this does.
"""

from ml_collections import ConfigDict

from alexnet_jax.config import default_config

PIXEL_STD = (0.229, 0.224, 0.225)  # of ImageNet, by which torchvision scales pixels of 0 to 1


def get_config() -> ConfigDict:
    """Returns the config, for the weights of torchvision's alexnet.

    For another network set the fields of its input to its own; a command that does not is refused,
    and told how.
    """
    c = default_config()
    c.dataset = "folder:photographs"
    c.train_split = "train"
    c.eval_split = "val"

    # The network to start from, a workdir. Its mean is subtracted here too; fc8 is made anew.
    c.init_from = "runs/torchvision"
    c.model.num_classes = 10

    # What the network's features were learned of.
    c.model.variant = "owt"
    c.augment.crop_size = 224
    c.augment.mean = "channel"
    c.augment.channel_scale = tuple(1 / (255 * std) for std in PIXEL_STD)

    # Edges and colours are much the same in all photographs: those layers stay, and a step is
    # spared their gradients.
    c.freeze = ("conv1", "conv2")
    # Of the others, fc8 alone begins by chance and has far to go.
    c.learning_rate = 0.001
    c.optimizer.layer_rates = (("fc8", 10.0),)

    c.batch_size = 64
    c.num_epochs = 30
    c.schedule.kind = "cosine"
    return c
