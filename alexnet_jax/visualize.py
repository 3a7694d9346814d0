"""Pictures of data, runs and networks: `python -m alexnet_jax.visualize WHAT …`."""

import argparse
import difflib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from alexnet_jax import config as configs
from alexnet_jax import inference as trained
from alexnet_jax.analysis import diagram as network_picture
from alexnet_jax.analysis import features as feature_maps
from alexnet_jax.analysis import figures as plots
from alexnet_jax.analysis import neighbors, occlusion
from alexnet_jax.analysis.samples import save_samples
from alexnet_jax.data import augment, decode
from alexnet_jax.data.prepare import open_or_prepare
from alexnet_jax.data.store import PREPARE_COMMAND, Store, open_store, read_attributes, store_paths
from alexnet_jax.models.alexnet import VARIANTS
from alexnet_jax.training import optimizer as optim
from alexnet_jax.training import sharding as parallel
from alexnet_jax.training.metrics import Row, read_metrics
from alexnet_jax.utils import distributed as hosts
from alexnet_jax.utils import process as runtime
from alexnet_jax.utils.errors import UserError, exits_cleanly, one_line
from alexnet_jax.utils.files import atomic_write, explain_write_errors

NEIGHBORS, QUERIES = 6, 5  # as in Figure 4
IMAGE_HELP = "a file of any format that Pillow reads"


def data(args: argparse.Namespace) -> None:
    """The first augmented batch of a run, without training."""
    config = configs.load(args.config, args.overrides)
    configs.check_bounds(config)
    augment.check(config)
    optim.make_schedule(config, steps_per_epoch=1.0)
    with hosts.joined():
        store = open_or_prepare(config)["train"]
        if hosts.is_first():
            path = (args.workdir or Path("runs") / config.name) / "samples.png"
            with _drawn(path, "another --workdir") as new:
                save_samples(config, store, 0, new)


def filters(args: argparse.Namespace) -> None:
    """conv1's filters, as in the paper's Figure 3: the two towers' one above the other."""
    path = _out(args, "filters.png")
    network = trained.load(args.workdir, args.step)
    kernel = np.asarray(network.variables["params"]["conv1"]["kernel"])
    with _drawn(path) as new:
        plots.save_filters(kernel, max(VARIANTS[network.config.model.variant].groups), new)


def features(args: argparse.Namespace) -> None:
    """What each layer makes of an image: maps, units and answers, on one page."""
    path = _out(args, "features.png")
    network = trained.load(args.workdir, args.step)
    image = _image(args.image, network.config.image_size)
    figure = feature_maps.features_figure(network, image)
    with _drawn(path) as new:
        figure.savefig(new)


def nearest(args: argparse.Namespace) -> None:
    """The training images nearest to an image by fc7, as in Figure 4 right."""
    path = _out(args, "neighbors.png")
    network = trained.load(args.workdir, args.step)
    if args.data_dir:
        network.config.data_dir = str(args.data_dir)
    train = _store(network.config, "train")
    if args.image:
        size = network.config.image_size
        queries = np.stack([_image(image, size) for image in args.image])
        names = [image.name for image in args.image]
    else:
        queries, names = _spread(_store(network.config, "eval"), QUERIES)
    count = min(NEIGHBORS, train.num_examples)
    indices, distances = neighbors.nearest_in_store(network, train, queries, count)
    found = train.read(indices.reshape(-1))
    images = found["image"].reshape(*indices.shape, *queries.shape[1:])
    classes = np.array(train.class_names)[found["label"].reshape(indices.shape)]
    captions = []
    for name, row, near in zip(names, classes, distances, strict=True):
        captions.append([name, *(f"{c}  {d:.3g}" for c, d in zip(row, near, strict=True))])
        print(f"{name}: {', '.join(captions[-1][1:])}")
    with _drawn(path) as new:
        plots.save_neighbors(queries, images, captions, new)


def occlude(args: argparse.Namespace) -> None:
    """How probable a class is while a grey square hides each place of an image."""
    path = _out(args, "occlusion.png")
    network = trained.load(args.workdir, args.step)
    image = _image(args.image, network.config.image_size)
    label = None if args.label is None else _label(network.class_names, args.label)
    found = occlusion.occlude(network, image, label, args.patch, args.stride)
    name = network.class_names[found.label]
    changed, row, column = found.largest_change()
    print(
        f"{name}: probability {found.probability:.3f}, and {changed:.3f} behind a square of "
        f"{found.patch}x{found.patch} pixels around row {row}, column {column} of the centre crop"
    )
    with _drawn(path) as new:
        occlusion.occlusion_figure(found, name).savefig(new)


def curves(args: argparse.Namespace) -> None:
    """The training curves of several runs in one plot; they may be training still."""
    args.workdir = args.workdirs[0]
    path = _out(args, "compared.png")
    workdirs = list(dict.fromkeys(args.workdirs))
    short = [workdir.resolve().name for workdir in workdirs]
    names = short if len(set(short)) == len(short) else map(str, workdirs)
    runs = {name: _rows(workdir) for name, workdir in zip(names, workdirs, strict=True)}
    with _drawn(path) as new:
        plots.curves_of_runs(runs).savefig(new)


def network(args: argparse.Namespace) -> None:
    """The network's layers with their shapes, as in Figure 2."""
    if (args.workdir is None) == (args.config is None):
        raise UserError("name either a workdir or --config FILE")
    if args.config:
        config = configs.load(args.config, args.overrides)
        configs.check_bounds(config)
        config.parallel = "jit"
        args.workdir = Path("runs") / config.name
    else:
        config = trained.saved_config(args.workdir)
    path = _out(args, "network.png")
    size = config.augment.crop_size
    figure = network_picture.network_figure(parallel.build_model(config), (size, size, 3))
    with _drawn(path) as new:
        figure.savefig(new)


@contextmanager
def _drawn(path: Path, other: str = "another --out") -> Iterator[Path]:
    """Gives a file to draw to, which takes its place when it is whole; prints where it is."""
    with explain_write_errors(path.parent, other):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as new:
            yield new
    print(path, flush=True)


def _out(args: argparse.Namespace, name: str) -> Path:
    path: Path = args.out or args.workdir / name
    if path.suffix.lower() != ".png" or path.is_dir():
        raise UserError(f"--out={path} must name a file that ends in .png")
    return path


def _image(path: Path, size: int) -> np.ndarray:
    image = decode.read_upright(path, size)
    if isinstance(image, str):
        raise UserError(f"{path} cannot be read ({image}); name an image file")
    return image


def _store(config: ConfigDict, use: str) -> Store:
    path = store_paths(config)[use]
    if read_attributes(path) is None:
        raise UserError(
            f"the images of this run are not at {path}; name their --data-dir, or prepare them: "
            f"{PREPARE_COMMAND}"
        )
    return open_store(path)


def _spread(store: Store, count: int) -> tuple[np.ndarray, list[str]]:
    """Returns images from all over a store, which may be sorted by class, and their classes."""
    examples = store.read(np.unique(np.linspace(0, store.num_examples - 1, count, dtype=int)))
    return examples["image"], [store.class_names[label] for label in examples["label"]]


def _label(class_names: Sequence[str], name: str) -> int:
    if name not in class_names:
        near = difflib.get_close_matches(name, class_names, n=3) or class_names[:3]
        raise UserError(f"no class {name!r}; there are {', '.join(near)} and others")
    return class_names.index(name)


def _rows(workdir: Path) -> list[Row]:
    path = workdir / "metrics.jsonl"
    try:
        rows = read_metrics(workdir)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}; put back a copy") from error
    if not rows:
        raise UserError(f"{path} has no rows yet; train longer or name another workdir")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or not {"split", "epoch", "loss", "top1"} <= row.keys():
            raise UserError(f"{path}, line {number}, is no row of metrics; put back a copy")
    return rows


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m alexnet_jax.visualize",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    whats = parser.add_subparsers(metavar="WHAT", required=True)
    of_run = argparse.ArgumentParser(add_help=False)
    of_run.add_argument("workdir", type=Path, metavar="WORKDIR", help="where a network lies")
    of_run.add_argument("--step", type=int, help="of its checkpoints; default: the best by top-1")

    def add(
        name: str,
        draw: Callable[[argparse.Namespace], None],
        *parents: argparse.ArgumentParser,
        out: str = "",
    ) -> argparse.ArgumentParser:
        told = draw.__doc__
        what = whats.add_parser(name, parents=parents, help=told, description=told)
        what.set_defaults(draw=draw)
        if out:
            what.add_argument("--out", type=Path, metavar="FILE.png", help=f"default: {out}")
        return what

    what = add("data", data)
    _add_config(what, required=True)
    what.add_argument("--workdir", type=Path, help="default: runs/<config name>")
    add("filters", filters, of_run, out="WORKDIR/filters.png")
    what = add("features", features, of_run, out="WORKDIR/features.png")
    what.add_argument("image", type=Path, metavar="IMAGE", help=IMAGE_HELP)
    what = add("neighbors", nearest, of_run, out="WORKDIR/neighbors.png")
    told = f"{IMAGE_HELP}; default: {QUERIES} from all over the run's eval split"
    what.add_argument("image", type=Path, metavar="IMAGE", nargs="*", help=told)
    what.add_argument("--data-dir", metavar="DIR", help="default: the run's own data_dir")
    what = add("occlusion", occlude, of_run, out="WORKDIR/occlusion.png")
    what.add_argument("image", type=Path, metavar="IMAGE", help=IMAGE_HELP)
    what.add_argument("--class", dest="label", metavar="NAME", help="default: what is answered")
    told = "the square's side in pixels; default: a quarter of the crop's"
    what.add_argument("--patch", type=int, metavar="PIXELS", help=told)
    told = "pixels from place to place; default: a 28th of the crop's side"
    what.add_argument("--stride", type=int, metavar="PIXELS", help=told)
    what = add("curves", curves, out="compared.png in the first WORKDIR")
    what.add_argument("workdirs", type=Path, nargs="+", metavar="WORKDIR", help="of train.py")
    what = add("network", network, out="WORKDIR/network.png, or runs/<config name>/network.png")
    what.add_argument("workdir", type=Path, nargs="?", metavar="WORKDIR", help="or else a config")
    _add_config(what)
    usages = [what.format_usage().split(maxsplit=4)[4] for what in whats.choices.values()]
    lines = [" ".join(usage.replace("[-h] ", "").split()) for usage in usages]
    parser.epilog = "\n  ".join(["WHAT in full, and more of each by WHAT --help:", *lines])
    return parser


def _add_config(what: argparse.ArgumentParser, required: bool = False) -> None:
    what.add_argument(
        "--config", required=required, metavar="FILE", help="e.g. configs/imagenet.py"
    )
    what.epilog = configs.OVERRIDES_HELP


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    words, overrides = configs.split_overrides(argv)
    args = _parser().parse_args(words)
    if overrides and not getattr(args, "config", None):
        raise UserError(f"--config.{overrides[0][0]} goes with --config FILE")
    args.overrides = overrides
    runtime.set_up()
    args.draw(args)


if __name__ == "__main__":
    main()
