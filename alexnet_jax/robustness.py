"""Measures errors under corruptions and on other photographs of a network's classes.

    python -m alexnet_jax.robustness runs/torchvision --imagenet-c ImageNet-C
    python -m alexnet_jax.robustness runs/torchvision --images imagenetv2-matched-frequency
    python -m alexnet_jax.robustness runs/imagenette --corruptions fog snow --count 500

--imagenet-c reads CORRUPTION/SEVERITY/CLASS. --images reads CLASS folders, of which there may be
fewer than the network has classes (ImageNetV2, ImageNet-A, ImageNet-R). --corruptions corrupts the
eval split of each network. mCE is normalized by AlexNet's published errors. Writes robustness.csv.
"""

import argparse
import csv
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from alexnet_jax import inference
from alexnet_jax.analysis import robustness
from alexnet_jax.analysis.robustness import SEVERITIES, Corrupter, Result
from alexnet_jax.data.prepare import open_or_prepare
from alexnet_jax.data.preprocess import PREPROCESSING
from alexnet_jax.inference import Trained
from alexnet_jax.utils import buckets, process
from alexnet_jax.utils.errors import UserError, exits_cleanly
from alexnet_jax.utils.files import atomic_write, explain_write_errors

# The pictures of ImageNet-C are what a network sees: 224 pixels, cropped already.
CROPPED = "brainscore"


def on_folders(network: Trained, args: argparse.Namespace) -> list[Result]:
    """Returns the result of class folders, or those of ImageNet-C's folders."""
    places = {("", 0): args.images}
    if args.imagenet_c:
        network = inference.with_preprocess(network, args.preprocess or CROPPED)
        places = robustness.corruption_folders(args.imagenet_c)
    else:
        network = inference.with_preprocess(network, args.preprocess)
    results = []
    for kind, place in _with_progress(places.items()):
        labels = robustness.labels_of_folders(place, network.class_names)
        images = robustness.folder_images(network, place, labels, args.batch_size)
        results.append(robustness.measure(network, images, [*labels.values()], kind))
    return results


def on_corruptions(network: Trained, args: argparse.Namespace) -> list[Result]:
    """Returns the results of the eval split, without and with each corruption and severity."""
    network = inference.with_preprocess(network, args.preprocess)
    config = network.config
    if args.data_dir:
        config.data_dir = args.data_dir
    store = open_or_prepare(config, ["eval"])["eval"]
    kinds = [("", 0), *((name, s) for name in args.corruptions for s in SEVERITIES)]
    cropped = inference.with_preprocess(network, CROPPED)
    classes = range(config.model.num_classes)
    with Corrupter(store, network.augment.view_size, args.count, args.batch_size) as corrupter:
        return [
            robustness.measure(cropped, corrupter.images(*kind), classes, kind)
            for kind in _with_progress(kinds)
        ]


def _with_progress(items: Iterable[Any]) -> tqdm:
    return tqdm(list(items), desc="evaluating", unit="set", disable=None, leave=False)


def format_results(results: Sequence[Result]) -> str:
    """Returns a table with a line for each corruption, averaged over severities, and mCE."""
    lines = ["corruption         images  top-1 error  top-5 error      CE"]
    errors = robustness.corruption_errors(results)
    for name in dict.fromkeys(result.corruption for result in results):
        own = [result for result in results if result.corruption == name]
        first, five = (
            100 * sum(getattr(result, field) for result in own) / len(own)
            for field in ("top1_error", "top5_error")
        )
        count = sum(result.num_images for result in own)
        ce = f"{100 * errors[name]:5.1f} %" if name in errors else ""
        lines.append(
            f"{name or 'none':17}  {count:6,}  {first:9.2f} %  {five:9.2f} %  {ce}".rstrip()
        )
    mce = robustness.mean_corruption_error(errors)
    if mce is not None:
        lines.append(f"mCE {100 * mce:.1f} %")
    return "\n".join(lines)


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog="python -m alexnet_jax.robustness",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("workdir", type=buckets.readable, nargs="+", help="workdirs of networks")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--imagenet-c", type=Path, metavar="FOLDER", help="in ImageNet-C's layout")
    what.add_argument("--images", type=Path, metavar="FOLDER", help="class folders with images")
    what.add_argument(
        "--corruptions",
        nargs="*",
        metavar="NAME",
        help="corrupt the eval split; all 15 corruptions by default",
    )
    parser.add_argument(
        "--count", type=int, default=1000, help="--corruptions: images (default: 1000)"
    )
    parser.add_argument(
        "--preprocess",
        choices=PREPROCESSING,
        help="how squares are made of images (default: that of the network; brainscore, which is "
        "no change at 224 pixels, for --imagenet-c)",
    )
    parser.add_argument("--batch-size", type=int, default=128, help="default: 128")
    parser.add_argument(
        "--data-dir", help="folder with the prepared data (default: data_dir of the config)"
    )
    parser.add_argument(
        "--out", type=buckets.local, help="folder for the results (default: the first workdir)"
    )
    args = parser.parse_args(argv)
    if args.batch_size < 1 or args.count < 1:
        raise UserError("--batch-size and --count must be at least 1")
    run: Callable[[Trained, argparse.Namespace], list[Result]] = on_folders
    if args.corruptions is not None:
        args.corruptions = args.corruptions or list(robustness.alexnet_errors())
        robustness.check_corruptions(args.corruptions)
        run = on_corruptions
    process.set_up()
    rows = []
    for workdir in args.workdir:
        results = run(inference.load(workdir, needs_classes=True), args)
        print(f"{workdir}\n{format_results(results)}\n", flush=True)
        rows += [{"network": str(workdir), **result._asdict()} for result in results]
    folder = args.out or buckets.folder_for_results(args.workdir[0])
    with explain_write_errors(folder, "another --out"):
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / "robustness.csv") as new, new.open("w", newline="") as file:
            table = csv.DictWriter(file, rows[0])
            table.writeheader()
            table.writerows(rows)
    print(f"wrote robustness.csv to {folder}")


if __name__ == "__main__":
    main()
