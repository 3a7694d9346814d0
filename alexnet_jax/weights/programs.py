"""The programs whose weights can be converted, with the preprocessing that each trained with."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32
from ml_collections import ConfigDict

from alexnet_jax.config import default_config
from alexnet_jax.utils.errors import UserError, one_line
from alexnet_jax.weights import caffe, cuda_convnet, lpips, torchvision
from alexnet_jax.weights.layouts import ChannelsFirst


class Program(NamedTuple):
    """A program that writes weights.

    Attributes:
      read: returns the variant and the weights of a file.
      crop_size: side of the network's input in pixels.
      pixel_mean: RGB, 0 to 255; subtracted where no mean image is given.
      channel_scale: factors of the mean-subtracted channels.
      image_mean: `augment.mean` of a network with a mean image; None if the program has none.
      conv1_padding: `model.conv1_padding`; -1 keeps the variant's padding.
      preprocess: `config.preprocess`, how the program made squares of its training images.
    """

    read: Callable[[Path], tuple[str, ChannelsFirst]]
    crop_size: int
    pixel_mean: tuple[float, ...]
    channel_scale: tuple[float, ...] = (1.0, 1.0, 1.0)
    image_mean: str | None = None
    conv1_padding: int = -1
    preprocess: str = "2012"

    def config(self, variant: str, num_classes: int, has_mean_image: bool) -> ConfigDict:
        """Returns the config of a converted network."""
        c = default_config()
        c.model.variant, c.model.num_classes = variant, num_classes
        c.model.conv1_padding = self.conv1_padding
        c.preprocess = self.preprocess
        c.augment.crop_size = self.crop_size
        c.augment.mean = self.image_mean if has_mean_image else "channel"
        c.augment.channel_scale = self.channel_scale
        c.augment.color_noise = 0.0  # no file contains the eigenvectors of the colors
        return c


TORCHVISION = Program(
    torchvision.read,
    crop_size=224,
    pixel_mean=tuple(255 * mean for mean in torchvision.PIXEL_MEAN),
    channel_scale=tuple(1 / (255 * std) for std in torchvision.PIXEL_STD),
    preprocess="torchvision",
)
# Its convolutions are torchvision's, and so are its pixels.
LPIPS = TORCHVISION._replace(read=lpips.read)
# Caffe's networks see 227 pixels without padding, which gives conv1 the paper's 55×55 outputs.
CAFFE = Program(
    *(caffe.read, 227, caffe.CHANNEL_MEAN),
    image_mean="image",
    conv1_padding=0,
    preprocess="caffe",
)
# Run #145 subtracted the center of the mean image, wherever the crop was.
CUDA_CONVNET = Program(cuda_convnet.read, 224, caffe.CHANNEL_MEAN, image_mean="image_center")


def program_of(source: Path) -> Program:
    """Returns the program that wrote a file, according to its content and then its suffix."""
    if source.is_dir():
        return CUDA_CONVNET
    head, suffix = torchvision.read_head(source), source.suffix.lower()
    if lpips.is_archive(head) or source.name == Path(lpips.FILE).name:
        return LPIPS
    if torchvision.format_of(head) or suffix in torchvision.SUFFIXES:
        return TORCHVISION
    return CAFFE if suffix == ".caffemodel" or caffe.starts_net(head) else CUDA_CONVNET


def read_mean(
    path: Path, program: Program
) -> Float32[np.ndarray, "256 256 3"] | Float32[np.ndarray, " 3"]:
    """Returns a mean image or channel means, RGB.

    Args:
      path: Caffe's .binaryproto, the 2012 program's batches.meta, or a .npy of shape [3, 256, 256]
        or [3], whose channels are blue, green, red if the program is Caffe.

    Raises:
      UserError: the file cannot be read, or the program has no mean image.
    """
    if program.image_mean is None:
        raise UserError(f"torchvision's alexnet has no mean image; omit --mean {path}")
    suffix = path.suffix.lower()
    is_bgr = suffix == ".binaryproto"
    if suffix == ".npy":
        mean, is_bgr = _read_npy(path), program is CAFFE
    else:
        mean = (caffe if is_bgr else cuda_convnet).read_mean(path)
    size = default_config().image_size
    if mean.size not in (3, 3 * size**2) or not np.all((mean >= 0) & (mean <= 255)):
        raise UserError(
            f"{path} has an array of shape {list(mean.shape)}; a mean has shape "
            f"[3, {size}, {size}] or [3] and values from 0 to 255"
        )
    channels = mean.astype(np.float32).reshape(3, -1)[:: -1 if is_bgr else 1].T
    return channels.reshape(size, size, 3) if len(channels) > 1 else channels[0]


def _read_npy(path: Path) -> np.ndarray:
    try:
        return np.asarray(np.load(path, allow_pickle=False), np.float32)
    except Exception as error:  # OSError, or anything that NumPy raises for a damaged file
        raise UserError(f"{path} cannot be read as a .npy file: {one_line(error)}") from error
