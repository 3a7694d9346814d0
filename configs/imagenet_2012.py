"""Run #145 as it ran in 2012: the paper's one-CNN row (40.66 % top-1, 18.21 % top-5, ten views).

Source: the authors' released program, github.com/computerhistory/AlexNet-Source-Code, its
layers/layers-145.cfg and layer-params-145.cfg. The code differs from the paper in places: the
variant `original` has the differences of the network, this file those of the recipe. One difference
is not reproduced: #145 drew one crop and one flip for every 32 consecutive images and never
reshuffled them. Here every image has its own, and every epoch has its own order.
"""

from ml_collections import ConfigDict

from alexnet_jax.config import default_config


def get_config() -> ConfigDict:
    """Returns the config."""
    c = default_config()
    c.dataset = "imagenet2012"
    c.eval_split = "validation"
    c.image_size = 256

    c.model.variant = "original"
    c.model.num_classes = 1000
    c.model.dropout = 0.5
    c.model.init = "paper"  # `original` itself has 0.03 in conv3 to conv5
    c.model.hidden_bias = 1.0

    c.augment.crop_size = 224  # --crop-border=16
    c.augment.flip = True
    c.augment.mean = "image_center"  # the center of the mean image, wherever the crop is
    c.augment.color_noise = 0.1  # --color-noise=0.1
    c.augment.color_noise_scale = "std"
    c.augment.color_noise_shrink = True  # the noisy image is divided by 1.1
    c.eval.views = "ten"

    c.batch_size = 128
    c.num_epochs = 91
    c.learning_rate = 0.01  # epsW
    c.optimizer.bias_learning_rate = 2.0  # epsB = 0.02
    c.optimizer.momentum = 0.9
    c.optimizer.weight_decay = 0.0005
    c.optimizer.bias_weight_decay = 0.0  # every bias matrix was built with wc = 0

    # The log of changes: epoch, layer, field, value. epsB stayed at 0.02, except in conv1, which
    # was frozen from epoch 72 on.
    c.schedule.kind = "constant"
    c.schedule.changes = (
        (25, "all", "learning_rate", 1e-3),
        (51, "all", "learning_rate", 1e-4),
        (67, "conv1", "learning_rate", 1e-5),
        (67, "data", "color_noise", 0.0),
        (72, "conv1", "learning_rate", 0.0),
        (72, "conv1", "bias_learning_rate", 0.0),
        (79, "all", "learning_rate", 1e-5),
        (79, "conv1", "learning_rate", 0.0),
    )
    return c
