"""Weights of other programs into a workdir, which all other commands here take, and to PyTorch.

    python -m alexnet_jax.convert alexnet.pth runs/torchvision
    python -m alexnet_jax.convert runs/torchvision alexnet.safetensors

SOURCE, by the ending of its name:

  .pth .pt .safetensors  torchvision's alexnet, a state_dict: becomes variant owt
  .caffemodel            Caffe's bvlc_alexnet or bvlc_reference_caffenet: paper or caffenet
  any other              a checkpoint EPOCH.BATCH, or its folder, of the authors' own program of
                         2012, run #145: original
  a workdir              of variant owt: becomes a state_dict of torchvision's alexnet
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32
from ml_collections import ConfigDict

from alexnet_jax import inference as trained
from alexnet_jax.config import default_config
from alexnet_jax.data import augment
from alexnet_jax.utils import process as runtime
from alexnet_jax.utils.errors import UserError, exits_cleanly, one_line
from alexnet_jax.weights import caffe as caffe_weights
from alexnet_jax.weights import cuda_convnet as weights_2012
from alexnet_jax.weights import layouts
from alexnet_jax.weights import torchvision as torch_weights

# Crops of which conv1 with torchvision's padding of 2 makes 55 rows, so that no pooling behind it
# rounds. At 227 conv1 has no padding here.
TORCH_CROPS = range(223, 227)


class Program(NamedTuple):
    """Where weights come from.

    Attributes:
      read: a file -> the variant and its weights.
      pixel_mean: subtracted, where there is no mean image: red, green and blue, 0 to 255.
      channel_scale: multiplies them then.
      image_mean: config.augment.mean for its mean image; None: it has none.
    """

    read: Callable[[Path], tuple[str, layouts.ChannelsFirst]]
    crop_size: int
    pixel_mean: tuple[float, ...]
    channel_scale: tuple[float, ...]
    image_mean: str | None


TORCHVISION = Program(
    torch_weights.read,
    crop_size=224,
    pixel_mean=tuple(255 * mean for mean in torch_weights.PIXEL_MEAN),
    channel_scale=tuple(1 / (255 * std) for std in torch_weights.PIXEL_STD),
    image_mean=None,
)
CAFFE = Program(caffe_weights.read, 227, caffe_weights.CHANNEL_MEAN, (1.0, 1.0, 1.0), "image")
PROGRAM_2012 = CAFFE._replace(read=weights_2012.read, crop_size=224, image_mean="image_center")


def program_of(source: Path) -> Program:
    """Returns the program that a file is of, by its name's ending."""
    if source.suffix in torch_weights.SUFFIXES:
        return TORCHVISION
    return CAFFE if source.suffix == ".caffemodel" else PROGRAM_2012


def to_workdir(
    source: Path, workdir: Path, mean_file: Path | None = None, names_file: Path | None = None
) -> str:
    """Makes a workdir of a file's network, and returns a sentence on it.

    Args:
      mean_file: with the mean image; by default the program's channel means are subtracted.
      names_file: the class names, one a line; by default they are class 0, class 1, …

    Raises UserError if a file cannot be read or is of another network, or the workdir is not new.
    """
    if not source.exists():
        raise UserError(f"{source} does not exist; name a file of weights, or a workdir")
    if workdir.suffix in torch_weights.SUFFIXES:
        raise UserError(f"{source} is no workdir: convert it into one, and that into {workdir}")
    if workdir.exists() and not (workdir.is_dir() and not any(workdir.iterdir())):
        raise UserError(f"{workdir} exists; choose a new workdir")
    program = program_of(source)
    mean = np.asarray(program.pixel_mean, np.float32)
    if mean_file:
        mean = read_mean(mean_file, program)
    variant, weights = program.read(source)
    params = layouts.to_params(weights, variant)
    config = _config(program, variant, len(params["fc8"]["bias"]), mean)
    config.name = source.stem
    names = read_class_names(names_file, config.model.num_classes) if names_file else ()
    no_noise = np.zeros((3, 3), np.float32)  # the colours' eigenvectors are in none of the files
    stats = augment.Statistics(mean, no_noise)
    trained.create(workdir, config, {"params": params}, stats, names)
    return (
        f"{workdir} holds variant {variant}, {config.model.num_classes} classes, for crops of "
        f"{program.crop_size} less {_told(mean)}"
    )


def to_torch(workdir: Path, target: Path, step: int | None = None) -> str:
    """Writes a workdir's network as torchvision's state_dict, and returns a sentence on it.

    Raises UserError if torchvision has no such network, or the file exists.
    """
    if target.suffix not in torch_weights.SUFFIXES:
        raise UserError(f"{target} must end in one of {' '.join(torch_weights.SUFFIXES)}")
    if target.exists():
        raise UserError(f"{target} exists; name another file, or remove that one")
    network = trained.load(workdir, step)
    model, crop_size = network.config.model, network.config.augment.crop_size
    if model.variant != "owt" or model.width != 1 or crop_size not in TORCH_CROPS:
        raise UserError(
            f"{workdir} has variant {model.variant} of width {model.width:g} for crops of "
            f"{crop_size}; torchvision's alexnet is variant owt of width 1 for crops of 224"
        )
    torch_weights.write(target, layouts.from_params(network.variables["params"]))
    mean = network.stats.mean.reshape(-1, 3).mean(0) / 255
    std = 1 / (255 * augment.scale(network.config))
    return (
        f"{target} holds step {network.step}; its images are to be normalised by "
        f"mean=[{_listed(mean)}], std=[{_listed(std)}]"
    )


def read_mean(
    path: Path, program: Program
) -> Float32[np.ndarray, "256 256 3"] | Float32[np.ndarray, " 3"]:
    """Returns a mean image or channel means: red, green, blue.

    Args:
      path: Caffe's .binaryproto, an array [3, 256, 256] or [3] in a .npy, which Caffe keeps in the
        order of blue, green, red, or the 2012 program's batches.meta.

    Raises UserError if it cannot be read, or the program has no mean image.
    """
    if program.image_mean is None:
        raise UserError(f"torchvision's alexnet has no mean image; leave --mean {path} out")
    blue_first = path.suffix == ".binaryproto"
    if path.suffix == ".npy":
        mean, blue_first = _read_npy(path), program is CAFFE
    else:
        mean = (caffe_weights if blue_first else weights_2012).read_mean(path)
    size = default_config().image_size
    if mean.size not in (3, 3 * size**2) or not np.all((mean >= 0) & (mean <= 255)):
        raise UserError(
            f"{path} holds an array of {list(mean.shape)}; a mean is [3, {size}, {size}] or [3], "
            "from 0 to 255"
        )
    channels = mean.astype(np.float32).reshape(3, -1)[:: -1 if blue_first else 1].T
    return channels.reshape(size, size, 3) if len(channels) > 1 else channels[0]


def _read_npy(path: Path) -> np.ndarray:
    try:
        return np.asarray(np.load(path, allow_pickle=False), np.float32)
    except Exception as error:  # of the file system, or whatever damage makes NumPy raise
        raise UserError(f"{path} cannot be read as a .npy: {one_line(error)}") from error


def read_class_names(path: Path, count: int) -> list[str]:
    """Returns a file's lines. Raises UserError if it cannot be read, or they are not so many."""
    try:
        names = path.read_text("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}") from error
    names = [name.strip() for name in names if name.strip()]
    if len(names) != count:
        raise UserError(f"{path} has {len(names)} names, one a line, but there are {count} classes")
    return names


def _config(program: Program, variant: str, classes: int, mean: np.ndarray) -> ConfigDict:
    c = default_config()
    c.model.variant, c.model.num_classes = variant, classes
    c.augment.crop_size = program.crop_size
    c.augment.mean = "channel" if mean.ndim == 1 else program.image_mean
    c.augment.channel_scale = program.channel_scale
    c.augment.color_noise = 0.0
    return c


def _told(mean: np.ndarray) -> str:
    if mean.ndim == 1:
        return f"the channel means {_listed(mean)}"
    return f"a mean image of {_listed(mean.mean((0, 1)))} on average"


def _listed(values: np.ndarray) -> str:
    return ", ".join(f"{value:.4g}" for value in values)


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m alexnet_jax.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, help="a file of weights, or a workdir")
    parser.add_argument("target", type=Path, help="a new workdir, or a new .pth or .safetensors")
    parser.add_argument(
        "--class-names", type=Path, metavar="FILE", help="one a line; default: class 0, class 1, …"
    )
    parser.add_argument(
        "--mean",
        type=Path,
        metavar="FILE",
        help="the mean image: Caffe's .binaryproto or .npy, the 2012 program's batches.meta; "
        "default: channel means of ILSVRC-2012",
    )
    parser.add_argument(
        "--step", type=int, help="of a workdir: which checkpoint; default: the best, or the newest"
    )
    args = parser.parse_args(argv)
    runtime.set_up()
    if (args.source / "config.json").is_file():
        if args.mean or args.class_names:
            raise UserError("--mean and --class-names are for a file; leave them out for a workdir")
        print(to_torch(args.source, args.target, args.step))
    else:
        if args.step is not None:
            raise UserError(f"--step is for a workdir, which {args.source} is not; leave it out")
        print(to_workdir(args.source, args.target, args.mean, args.class_names))


if __name__ == "__main__":
    main()
