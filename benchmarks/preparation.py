"""How fast is a store prepared, beside tf.data that only decodes the same JPEGs?

    python benchmarks/preparation.py --scratch /dev/shm

Both read the TFRecord files of one tfds data set with photographs like ImageNet's, on all cores.
Preparing decodes, scales to 256x256, computes statistics and checksums, and writes the store;
tf.data discards its images.
"""

import io
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # read when TensorFlow is imported

import tensorflow_datasets as tfds  # noqa: E402
from harness import parser, ratio, row, show, write  # noqa: E402
from photographs import jpegs  # noqa: E402

from alexnet_jax.data.prepare import prepare_store  # noqa: E402
from alexnet_jax.data.sources import open_source  # noqa: E402

IMAGES, QUICK_IMAGES, DISTINCT, ROUNDS = 12_288, 128, 512, 3
NAME = "benchmark_photographs"  # what tfds calls the class below


class BenchmarkPhotographs(tfds.core.GeneratorBasedBuilder):
    """`count` JPEGs with the features of tfds's imagenet2012."""

    VERSION = tfds.core.Version("1.0.0")
    count = IMAGES

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(num_classes=1000),
            "file_name": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict]]:
        contents = jpegs(min(self.count, DISTINCT))
        for n in range(self.count):
            image = io.BytesIO(contents[n % len(contents)])
            yield n, {"image": image, "label": n % 1000, "file_name": f"{n}.JPEG"}


def decode_only(data_dir: str) -> None:
    """Reads, parses and decodes in parallel by tf.data, and discards the images."""
    builder = tfds.builder(NAME, data_dir=data_dir)
    for _ in builder.as_dataset(split="train", shuffle_files=False).prefetch(8):
        pass


def prepare(data_dir: str, path: Path, storage: str) -> int:
    """Prepares a store and removes it; returns the size of its files in bytes."""
    prepare_store(open_source(NAME, data_dir, "train", "train"), str(path), 256, storage)
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    shutil.rmtree(path)
    return size


def main() -> None:
    options = parser(__doc__, quick="few images, one round")
    options.add_argument("--scratch", type=Path, metavar="DIR", help="write the stores to DIR")
    args = options.parse_args()
    count = BenchmarkPhotographs.count = QUICK_IMAGES if args.quick else IMAGES
    with (
        tempfile.TemporaryDirectory() as data_dir,
        tempfile.TemporaryDirectory(dir=args.scratch) as scratch,
    ):
        tfds.builder(NAME, data_dir=data_dir).download_and_prepare()
        runs: dict[str, Callable[[], int | None]] = {
            "tf.data, decoding only": lambda: decode_only(data_dir),
            "preparing a raw store": lambda: prepare(data_dir, Path(scratch, "store"), "raw"),
            "preparing a jpeg store": lambda: prepare(data_dir, Path(scratch, "store"), "jpeg"),
        }
        rates, cpu, sizes = {}, {}, {}
        for number in range(2 if args.quick else 1 + ROUNDS):
            for name, run in runs.items():
                wall, busy = time.perf_counter(), time.process_time()
                sizes[name] = run()
                if number:  # the first round warms up
                    rate = count / (time.perf_counter() - wall)
                    rates.setdefault(name, []).append(rate)
                    milliseconds = 1e3 * (time.process_time() - busy) / count
                    cpu.setdefault(name, []).append(milliseconds)
    tf_data, *ours = runs
    rows = [row(name, values, "images/s") for name, values in rates.items()]
    rows += [ratio(f"{name} / tf.data", rates[name], rates[tf_data]) for name in ours]
    rows += [row(name, values, "CPU ms/image") for name, values in cpu.items()]
    rows += [row(name, [sizes[name] / count], "bytes/image") for name in ours]
    show(rows)
    write(rows, args.json)


if __name__ == "__main__":
    main()
