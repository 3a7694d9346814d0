"""Images a second of preparing a store, beside tf.data that only decodes the same JPEGs.

    python benchmarks/preparation.py [--scratch DIR]

Both read the TFRecord files of one tfds data set of photographs like ImageNet's, on all cores, turn
by turn in one process. Preparing is decoding, scaling to 256x256, statistics, checksums and writing
the store to DIR; tf.data throws its images away.
"""

import io
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(Path(__file__).parent.parent))

import tensorflow_datasets as tfds  # noqa: E402  (it must find the variable above)
from photographs import jpegs  # noqa: E402
from rows import options, row, write  # noqa: E402

from alexnet_jax.config import default_config  # noqa: E402
from alexnet_jax.data.prepare import prepare_store  # noqa: E402
from alexnet_jax.data.sources import open_source  # noqa: E402

DISTINCT = 512


class BenchmarkPhotographs(tfds.core.GeneratorBasedBuilder):
    """So many JPEGs as `count` says, in tfds's imagenet2012's own features."""

    VERSION = tfds.core.Version("1.0.0")
    count = 0

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(num_classes=1000),
            "file_name": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        del dl_manager
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict]]:
        contents = jpegs(min(self.count, DISTINCT))
        for number in range(self.count):
            image = io.BytesIO(contents[number % len(contents)])
            yield number, {"image": image, "label": number % 1000, "file_name": f"{number}.JPEG"}


def decode_only(data_dir: Path) -> None:
    """tf.data's way: files, parsing and decoding in parallel, nothing else."""
    builder = tfds.builder("benchmark_photographs", data_dir=data_dir)
    for _ in builder.as_dataset(split="train", shuffle_files=False).prefetch(8):
        pass


def prepare(data_dir: Path, scratch: Path, storage: str) -> int:
    """Ours; returns the bytes of the store's files."""
    config = default_config()
    config.dataset, config.data_dir = "benchmark_photographs", str(data_dir)
    config.storage = storage
    path = scratch / "store"
    prepare_store(open_source(config, "train"), str(path), config)
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    shutil.rmtree(path)
    return size


def timed(run: Callable[[], int | None]) -> tuple[float, float, int]:
    """Returns wall seconds, CPU seconds of all threads, and the bytes written."""
    wall, cpu = time.perf_counter(), time.process_time()
    size = run() or 0
    return time.perf_counter() - wall, time.process_time() - cpu, size


def main() -> None:
    """Prints a table of medians, and writes it as rows if asked."""
    parser = options(__doc__, quick="few images, two rounds")
    parser.add_argument("--scratch", type=Path, help="where stores are written; default: temporary")
    args = parser.parse_args()
    BenchmarkPhotographs.count = 128 if args.quick else 12_288
    with (
        tempfile.TemporaryDirectory() as folder,
        tempfile.TemporaryDirectory(dir=args.scratch) as s,
    ):
        data_dir = Path(folder)
        tfds.builder("benchmark_photographs", data_dir=data_dir).download_and_prepare()
        runs = {
            "tf.data, decoding only": lambda: decode_only(data_dir),
            "preparing a raw store": lambda: prepare(data_dir, Path(s), "raw"),
            "preparing a jpeg store": lambda: prepare(data_dir, Path(s), "jpeg"),
        }
        times = {what: [] for what in runs}
        for number in range(3 if args.quick else 4):
            for what, run in runs.items():
                seconds = timed(run)
                if number:  # the first round warms up
                    times[what].append(seconds)
    rows = []
    for what, turns in times.items():
        rates = [BenchmarkPhotographs.count / wall for wall, _, _ in turns]
        cpu = [1e3 * busy / BenchmarkPhotographs.count for _, busy, _ in turns]
        rows.append(row(what, rates, "images/s", batch=1))
        rows.append(row(what, cpu, "CPU ms/image", batch=1))
    sizes = {what: turns[-1][2] / BenchmarkPhotographs.count for what, turns in times.items()}
    bare = {of["unit"]: of["median"] for of in rows[:2]}
    for of in rows:
        print(
            f"{of['what']:24} {of['median']:8.2f} {of['unit']:13} ({of['min']:.2f} to "
            f"{of['max']:.2f})  {of['median'] / bare[of['unit']]:.2f} times tf.data's"
        )
    rows += [row(what, [size], "bytes/image", batch=1) for what, size in sizes.items() if size]
    for of in rows[len(times) * 2 :]:
        print(f"{of['what']:24} {of['value']:8.0f} {of['unit']}")
    write(rows, args.json)


if __name__ == "__main__":
    main()
