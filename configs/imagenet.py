"""The 2012 paper's recipe as written, for ILSVRC-2012.

Krizhevsky, Sutskever, Hinton: "ImageNet Classification with Deep Convolutional Neural Networks",
NIPS 2012. Its one-CNN result: 40.7 % top-1 and 18.2 % top-5 error, ten views (Table 2). Needs
ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar in <data_dir>/downloads/manual.
"""

from ml_collections import ConfigDict

from alexnet_jax.config import default_config


def get_config() -> ConfigDict:
    """Returns the config; § are the paper's sections."""
    c = default_config()
    c.dataset = "imagenet2012"  # § 2: ILSVRC-2012, 1.2 million images, 1000 classes
    c.eval_split = "validation"
    c.image_size = 256  # § 2: shorter side 256, central 256×256

    c.model.variant = "paper"  # § 3: groups 2, LRN after conv1 and conv2
    c.model.num_classes = 1000
    c.model.dropout = 0.5  # § 4.2
    c.model.init = "paper"  # § 5: N(0, 0.01²) in every layer
    c.model.hidden_bias = 1.0  # § 5: conv2, conv4, conv5 and the hidden layers; 0 elsewhere

    c.augment.crop_size = 224  # § 4.1
    c.augment.flip = True  # § 4.1
    c.augment.mean = "image"  # § 2: the mean over the training set, from each pixel
    c.augment.color_noise = 0.1  # § 4.1: α ~ N(0, 0.1), read as its standard deviation
    c.augment.color_noise_scale = "eigenvalue"  # § 4.1: α times the eigenvalue
    c.eval.views = "ten"  # § 4.1: four corners, center, and their reflections

    c.batch_size = 128  # § 5
    c.num_epochs = 90  # § 5: "roughly 90 cycles"
    c.learning_rate = 0.01  # § 5
    c.optimizer.momentum = 0.9  # § 5
    c.optimizer.weight_decay = 0.0005  # § 5, scaled by the learning rate, in the velocity
    c.optimizer.bias_weight_decay = (
        0.0  # § 5 decays "the weight w"; the authors' code decays no bias
    )
    c.optimizer.bias_learning_rate = 1.0  # § 5: "an equal learning rate for all layers"
    c.schedule.kind = "plateau"  # § 5: divided by 10 when validation error stopped improving
    c.schedule.factor = 0.1  # § 5
    c.schedule.max_drops = 3  # § 5: "reduced three times prior to termination"
    c.schedule.patience = 5  # not in the paper, whose authors watched the error and chose by hand
    return c
