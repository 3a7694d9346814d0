"""Draws pictures of data, training runs and trained networks."""

import argparse
import dataclasses
import difflib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from alexnet_jax import config as configs
from alexnet_jax import inference
from alexnet_jax.analysis import attribution, diagram, figures, neighbors, occlusion
from alexnet_jax.analysis.features import features_figure
from alexnet_jax.data import augment, decode
from alexnet_jax.data.pipeline import build_order
from alexnet_jax.data.prepare import open_or_prepare
from alexnet_jax.data.preprocess import PREPROCESSING
from alexnet_jax.data.store import PREPARE_COMMAND, Store, open_store, read_attributes, store_paths
from alexnet_jax.models import summary
from alexnet_jax.models.alexnet import towers
from alexnet_jax.models.build import build_model
from alexnet_jax.training.metrics import Row, read_metrics
from alexnet_jax.training.optimizer import make_optimizer
from alexnet_jax.utils import buckets, distributed, process
from alexnet_jax.utils.errors import UserError, exits_cleanly, one_line
from alexnet_jax.utils.files import atomic_write, explain_write_errors, printable

NEIGHBORS, QUERIES = 6, 5  # as in the paper's Figure 4
MAXIMIZED = 9  # units
IMAGE_HELP = "an image file of any format that Pillow reads"

# Each function below is a subcommand; its docstring is the help text.


def data(args: argparse.Namespace) -> None:
    """Draws the first augmented batch of a training run, without training."""
    config = configs.load(args.config, args.overrides)
    configs.check_bounds(config)
    # Report errors of the config before the data is prepared, which may take hours.
    augment.make_augment(config)
    make_optimizer(config, steps_per_epoch=1.0)
    with distributed.joined():
        store = open_or_prepare(config)["train"]
        if distributed.is_first():
            path = (args.workdir or Path("runs") / config.name) / "samples.png"
            steps_per_epoch = store.num_examples / config.batch_size
            order = build_order(store, config)
            stats = augment.statistics(store, config)
            augmentation = augment.make_augment(config, stats, steps_per_epoch)
            with _output(path, "another --workdir") as new:
                draws = configs.seed_for(config, "dropout"), 0
                figures.save_samples(order, augmentation, draws, new)


def filters(args: argparse.Namespace) -> None:
    """Draws the filters of conv1 as in the paper's Figure 3, one tower above the other."""
    path = _out_path(args, "filters.png")
    network = inference.load(args.workdir, args.step)
    kernel = np.asarray(network.variables["params"]["conv1"]["kernel"])
    with _output(path) as new:
        figures.save_filters(kernel, towers(network.model.variant), new)


def features(args: argparse.Namespace) -> None:
    """Draws the output of every layer for one image on one page."""
    path = _out_path(args, "features.png")
    network = inference.load(args.workdir, args.step)
    image = _read_image(args.image, network.config)
    figure = features_figure(network, image)
    with _output(path) as new:
        figure.savefig(new)


def nearest(args: argparse.Namespace) -> None:
    """Draws the training images nearest to given images by fc7, as in Figure 4 right."""
    path = _out_path(args, "neighbors.png")
    network = inference.load(args.workdir, args.step)
    if args.data_dir:
        network.config.data_dir = str(args.data_dir)
    train = dataclasses.replace(_open_store(network.config, "train"), reads_squares=True)
    if args.image:
        queries = np.stack([_read_image(image, network.config) for image in args.image])
        names = [printable(image.name) for image in args.image]
    else:
        queries, names = _evenly_spaced(_open_store(network.config, "eval"), QUERIES)
    count = min(NEIGHBORS, train.num_examples)
    indices, distances = neighbors.nearest_in_store(network, train, queries, count)
    found = train.read(indices.reshape(-1))
    images = found["image"].reshape(*indices.shape, *queries.shape[1:])
    classes = np.array(train.class_names)[found["label"].reshape(indices.shape)]
    captions = []
    for name, row, near in zip(names, classes, distances, strict=True):
        captions.append([name, *(f"{c}  {d:.3g}" for c, d in zip(row, near, strict=True))])
        print(f"{name}: {', '.join(captions[-1][1:])}")
    with _output(path) as new:
        figures.save_neighbors(queries, images, captions, new)


def occlude(args: argparse.Namespace) -> None:
    """Draws how probable a class is while a gray square hides each part of an image."""
    path = _out_path(args, "occlusion.png")
    network = inference.load(args.workdir, args.step, needs_classes=True)
    image = _read_image(args.image, network.config)
    label = None if args.label is None else _find_label(network.class_names, args.label)
    result = occlusion.occlude(network, image, label, args.patch, args.stride)
    name = network.class_names[result.label]
    changed, row, column = result.largest_change()
    print(
        f"{name}: probability {result.probability:.3f}, and {changed:.3f} with a square of "
        f"{result.patch}x{result.patch} pixels around row {row}, column {column} of the center crop"
    )
    with _output(path) as new:
        occlusion.occlusion_figure(result, name).savefig(new)


def attribute(args: argparse.Namespace) -> None:
    """Draws which pixels and parts of an image speak for a class: saliency and Grad-CAM."""
    path = _out_path(args, "attribution.png")
    network = inference.load(args.workdir, args.step, needs_classes=True)
    image = _read_image(args.image, network.config)
    label = None if args.label is None else _find_label(network.class_names, args.label)
    found = attribution.attribute(network, image, label)
    name = network.class_names[found.label]
    print(f"{name}: probability {found.probability:.3f}")
    with _output(path) as new:
        attribution.attribution_figure(found, name).savefig(new)


def maximize(args: argparse.Namespace) -> None:
    """Draws images that excite units: of a convolution's maps, or of a fully connected layer."""
    path = _out_path(args, "maximize.png")
    network = inference.load(args.workdir, args.step)
    units = range(MAXIMIZED) if args.units is None else args.units
    ascent = attribution.Ascent(**({} if args.steps is None else {"steps": args.steps}))
    if ascent.steps < 1:
        raise UserError(f"--steps {ascent.steps} must be at least 1")
    found = attribution.maximize(network, args.layer, list(units), ascent)
    with _output(path) as new:
        figures.save_sample_grid(found, [f"{args.layer}: {unit}" for unit in units], new)


def curves(args: argparse.Namespace) -> None:
    """Plots the training curves of several runs, finished or not, in one figure."""
    args.workdir = args.workdirs[0]
    path = _out_path(args, "compared.png")
    workdirs = list(dict.fromkeys(args.workdirs))
    short = [workdir.resolve().name for workdir in workdirs]
    names = map(printable, short if len(set(short)) == len(short) else workdirs)
    runs = {name: _read_rows(workdir) for name, workdir in zip(names, workdirs, strict=True)}
    with _output(path) as new:
        figures.curves_of_runs(runs).savefig(new)


def network(args: argparse.Namespace) -> None:
    """Draws the layers of the network with their shapes, as in Figure 2; --csv writes a table."""
    if (args.workdir is None) == (args.config is None):
        raise UserError("name either a workdir or --config NAME")
    if args.config:
        config = configs.load(args.config, args.overrides)
        configs.check_bounds(config)
        args.workdir = Path("runs") / config.name
    else:
        config = inference.saved_config(args.workdir)
    path = _out_path(args, "network.png")
    if args.csv and (args.csv.suffix.lower() != ".csv" or args.csv.is_dir()):
        raise UserError(f"--csv={args.csv} must name a file that ends in .csv")
    size = config.augment.crop_size
    model, shape = build_model(config), (size, size, 3)
    figure = diagram.network_figure(model, shape)
    with _output(path) as new:
        figure.savefig(new)
    if args.csv:
        with _output(args.csv, "another --csv") as new:
            summary.write_layer_csv(summary.operation_table(model, shape), new)


@contextmanager
def _output(path: Path, other: str = "another --out") -> Iterator[Path]:
    """Gives a path to draw to, which replaces `path` when it is complete; prints `path`."""
    with explain_write_errors(path.parent, other):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as new:
            yield new
    print(path, flush=True)


def _out_path(args: argparse.Namespace, name: str) -> Path:
    path: Path = args.out or buckets.folder_for_results(args.workdir) / name
    if path.suffix.lower() != ".png" or path.is_dir():
        raise UserError(f"--out={path} must name a file that ends in .png")
    return path


def _read_image(path: Path, config: ConfigDict) -> np.ndarray:
    decoder = PREPROCESSING[config.preprocess].decode
    image = decode.read_square(path, config.image_size, decoder)
    if isinstance(image, str):
        raise UserError(f"{path} cannot be read ({image}); name an image file")
    return image


def _open_store(config: ConfigDict, split: str) -> Store:
    path = store_paths(config)[split]
    if read_attributes(path) is None:
        raise UserError(
            f"there are no prepared images of this run at {path}; pass their --data-dir, or "
            f"prepare them: {PREPARE_COMMAND}"
        )
    return open_store(path)


def _evenly_spaced(store: Store, count: int) -> tuple[np.ndarray, list[str]]:
    """Returns evenly spaced images, because a store may be sorted by class, and their classes."""
    examples = store.read(np.unique(np.linspace(0, store.num_examples - 1, count, dtype=int)))
    return examples["image"], [store.class_names[label] for label in examples["label"]]


def _find_label(class_names: Sequence[str], name: str) -> int:
    if name not in class_names:
        near = difflib.get_close_matches(name, class_names, n=3) or class_names[:3]
        raise UserError(f"there is no class {name!r}; some that exist: {', '.join(near)}")
    return class_names.index(name)


def _read_rows(workdir: Path) -> list[Row]:
    path = workdir / "metrics.jsonl"
    try:
        rows = read_metrics(workdir)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}; restore a copy") from error
    if not rows:
        raise UserError(f"{path} has no rows yet; train longer or name another workdir")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or not {"split", "epoch", "loss", "top1"} <= row.keys():
            raise UserError(f"{path}, line {number}, is not a row of metrics; restore a copy")
    return rows


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m alexnet_jax.visualize",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    pictures = parser.add_subparsers(metavar="PICTURE", required=True)
    of_network = argparse.ArgumentParser(add_help=False)
    of_network.add_argument(
        "workdir",
        type=buckets.readable,
        metavar="WORKDIR",
        help="workdir of a training run or of alexnet_jax.convert",
    )
    of_network.add_argument(
        "--step", type=int, help="step of the checkpoint (default: the best top-1 accuracy)"
    )

    def add(
        name: str,
        draw: Callable[[argparse.Namespace], None],
        *parents: argparse.ArgumentParser,
        out: str = "",
    ) -> argparse.ArgumentParser:
        text = draw.__doc__
        picture = pictures.add_parser(name, parents=parents, help=text, description=text)
        picture.set_defaults(draw=draw)
        if out:
            picture.add_argument(
                "--out", type=buckets.local, metavar="FILE.png", help=f"default: {out}"
            )
        return picture

    picture = add("data", data)
    _add_config(picture, required=True)
    picture.add_argument("--workdir", type=buckets.local, help="default: runs/<config name>")
    add("filters", filters, of_network, out="WORKDIR/filters.png")
    picture = add("features", features, of_network, out="WORKDIR/features.png")
    picture.add_argument("image", type=Path, metavar="IMAGE", help=IMAGE_HELP)
    picture = add("neighbors", nearest, of_network, out="WORKDIR/neighbors.png")
    text = f"{IMAGE_HELP} (default: {QUERIES} images of the eval split)"
    picture.add_argument("image", type=Path, metavar="IMAGE", nargs="*", help=text)
    text = "folder with the prepared data (default: that of the run)"
    picture.add_argument("--data-dir", metavar="DIR", help=text)
    picture = add("occlusion", occlude, of_network, out="WORKDIR/occlusion.png")
    picture.add_argument("image", type=Path, metavar="IMAGE", help=IMAGE_HELP)
    text = "class whose probability is drawn (default: the most probable one)"
    picture.add_argument("--class", dest="label", metavar="NAME", help=text)
    text = "side of the square in pixels (default: 1/4 of the crop)"
    picture.add_argument("--patch", type=int, metavar="PIXELS", help=text)
    text = "pixels from one position to the next (default: 1/28 of the crop)"
    picture.add_argument("--stride", type=int, metavar="PIXELS", help=text)
    picture = add("attribution", attribute, of_network, out="WORKDIR/attribution.png")
    picture.add_argument("image", type=Path, metavar="IMAGE", help=IMAGE_HELP)
    text = "class whose pixels are drawn (default: the most probable one)"
    picture.add_argument("--class", dest="label", metavar="NAME", help=text)
    picture = add("maximize", maximize, of_network, out="WORKDIR/maximize.png")
    text = "such as conv5, features.10 or fc8; before a ReLU silent units have a gradient too"
    picture.add_argument("--layer", required=True, metavar="NAME", help=text)
    text = f"maps or units, from 0 (default: the first {MAXIMIZED})"
    picture.add_argument("--units", type=int, nargs="+", metavar="N", help=text)
    text = f"updates of the images (default: {attribution.Ascent.steps})"
    picture.add_argument("--steps", type=int, help=text)
    picture = add("curves", curves, out="compared.png in the first WORKDIR")
    text = "workdir of a training run"
    picture.add_argument("workdirs", type=buckets.readable, nargs="+", metavar="WORKDIR", help=text)
    picture = add("network", network, out="WORKDIR/network.png or runs/<config name>/network.png")
    text = "workdir whose network is drawn; alternatively, pass --config"
    picture.add_argument("workdir", type=buckets.readable, nargs="?", metavar="WORKDIR", help=text)
    text = (
        "also write shape, stride, receptive field, parameters, multiply-accumulates and bytes of "
    )
    text += "each operation"
    picture.add_argument("--csv", type=buckets.local, metavar="FILE.csv", help=text)
    _add_config(picture)
    usages = [picture.format_usage().split(maxsplit=4)[4] for picture in pictures.choices.values()]
    lines = [" ".join(usage.replace("[-h] ", "").split()) for usage in usages]
    parser.epilog = "\n  ".join(["usage of each picture (PICTURE --help explains it):", *lines])
    return parser


def _add_config(parser: argparse.ArgumentParser, required: bool = False) -> None:
    parser.add_argument(
        "--config", required=required, metavar="NAME", help="a bundled config or a file"
    )
    parser.epilog = "any field of the config: --config.FIELD=VALUE, such as --config.batch_size=64"


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    words, overrides = configs.split_overrides(argv)
    args = _make_parser().parse_args(words)
    if overrides and not getattr(args, "config", None):
        raise UserError(f"--config.{overrides[0][0]} needs --config NAME")
    args.overrides = overrides
    process.set_up()
    args.draw(args)


if __name__ == "__main__":
    main()
