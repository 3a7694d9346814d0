"""Images a second that reach the training loop: from JPEG by tf.data and PyTorch, from the store.

    python benchmarks/input_pipeline.py [--plot FILE.png]

All read the same photographs, of ImageNet's size in pixels and bytes, out of the page cache.
tf.data and PyTorch decode, crop and flip; the store holds decoded images, and cropping and
flipping them is a part of the training step.
"""

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

import contenders
from contenders import CHECKSUM, COPY_ALL, DEVICE, HOST, ON_ONE_CORE, PREAD, REFERENCES, TF_DATA
from rows import options, row, write
from turns import CORES, Turn, take_turns

sys.path.insert(0, str(Path(__file__).parent.parent))

RATE, PER_CORE, RATIO = "images/s", "images/s/core", f"times {TF_DATA}"
WORK, MEMORY = "cpu µs/image", "peak resident bytes"

Found = Mapping[str, Sequence[Turn]]
Series = Mapping[str, Sequence[float]]  # by unit; a value a round


def main() -> None:
    """Prints the table and what it says; writes rows and a plot if asked."""
    args = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        data = contenders.write_data(Path(folder), args.images)
        makers = contenders.makers(data, args.batch_size)
        found = take_turns(makers, 2 if args.quick else 5, args.seconds)
    table = {name: series(name, found) for name in found}
    print_table(table)
    print_sentences(found, data.store_bytes)
    figures = [(name, unit, values[unit]) for name, values in table.items() for unit in values]
    write([row(name, of, unit, args.batch_size) for name, unit, of in figures], args.json)
    if args.plot:
        save_plot(table, args.plot)


def parse_arguments() -> argparse.Namespace:
    parser = options(__doc__, quick="less of everything")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw bars there")
    parser.add_argument("--images", type=int, metavar="N", help="training images (4096)")
    parser.add_argument("--batch-size", type=int, metavar="B", help="(128)")
    parser.add_argument("--seconds", type=float, metavar="S", help="of each turn (4)")
    quick = parser.parse_known_args()[0].quick
    sizes = (64, 8, 0.05) if quick else (4096, 128, 4.0)
    parser.set_defaults(**dict(zip(("images", "batch_size", "seconds"), sizes, strict=True)))
    return parser.parse_args()


def series(name: str, found: Found) -> Series:
    """Returns all that the table tells of one contender."""
    turns, cores = found[name], 1 if name in ON_ONE_CORE else CORES
    values = {
        RATE: [turn.rate for turn in turns],
        PER_CORE: [turn.rate / cores for turn in turns],
        RATIO: [turn.rate / base.rate for turn, base in zip(turns, found[TF_DATA], strict=True)],
        WORK: [turn.user + turn.kernel for turn in turns],
    }
    if name not in REFERENCES:
        values[MEMORY] = [turns[-1].peak_bytes]
    return values


def print_table(table: Mapping[str, Series]) -> None:
    heads = f"{'images/s':>9} {'(min to max)':>18} {'/s/core':>8} {'ratio':>6} {'cpu µs':>7}"
    print(f"\n{'':29} {heads} {'peak':>8}")
    for name, values in table.items():
        of = {unit: median(numbers) for unit, numbers in values.items()}
        spread = f"({min(values[RATE]):.0f} to {max(values[RATE]):.0f})"
        memory = f" {of[MEMORY] / 1e6:5.0f} MB" if MEMORY in of else ""
        print(
            f"{name:29} {of[RATE]:9.0f} {spread:>18} {of[PER_CORE]:8.0f} {of[RATIO]:6.1f} "
            f"{of[WORK]:7.0f}{memory}"
        )
    print(f"(ratio: to {TF_DATA}, round by round; cpu µs: worked for an image, over all cores)")


def print_sentences(found: Found, store_bytes: int) -> None:
    """Says how far ours is from what the machine can do, and what takes the rest of the time."""
    of = {name: Turn(*map(median, zip(*turns, strict=True))) for name, turns in found.items()}
    ours = of[HOST]
    print(
        f"\nTo host batches: {ours.rate / of[COPY_ALL].rate:.0%} of memcpy's speed and "
        f"{ours.rate / of[PREAD].rate:.0%} of pread's, with {ours.peak_bytes / 1e6:.0f} MB of "
        f"memory for a store of {store_bytes / 1e6:.0f} MB."
    )
    whole, worked = 1e6 * CORES / ours.rate, ours.user + ours.kernel
    read, checksum = of[PREAD].user + of[PREAD].kernel, of[CHECKSUM].user
    parts = {
        "as pread alone": read,
        "other work of the kernel (memory, threads)": ours.kernel - read,
        "checksum": checksum,
        "other work": ours.user - checksum,
        "waiting": whole - worked,
    }
    split = ", ".join(f"{name} {value:.1f}" for name, value in parts.items())
    print(f"An image takes {whole:.1f} µs of a core: {split}.")
    less = (of[TF_DATA].user + of[TF_DATA].kernel) / worked
    print(f"It is {less:.1f} times less work for the processor than in tf.data.")


def save_plot(table: Mapping[str, Series], path: Path) -> None:
    """Writes a bar for each contender, 900 pixels wide: median images a second, and their range."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rates = [values[RATE] for values in table.values()]
    medians = list(map(median, rates))
    ends = [[median(of) - min(of) for of in rates], [max(of) - median(of) for of in rates]]
    figure, axes = plt.subplots(figsize=(9, 0.45 * len(table) + 0.8), layout="constrained")
    colors = ["tab:blue" if name in (HOST, DEVICE) else "silver" for name in table]
    bars = axes.barh(list(table), medians, xerr=ends, color=colors, ecolor="dimgray")
    labels = [f"{median(of[RATE]):,.0f}  ({median(of[RATIO]):.1f}×)" for of in table.values()]
    axes.bar_label(bars, labels, padding=6)
    axes.invert_yaxis()  # the first on top, as in the table
    axes.set(xlabel=f"images/s on {CORES} cores  (× {TF_DATA})")
    axes.margins(x=0.28)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    main()
