"""How many images per second reach the training loop, beside tf.data and PyTorch's DataLoader?

    python benchmarks/input_pipeline.py --images 8192 --seconds 3

All contenders read the same photographs, of ImageNet's size, from the page cache. tf.data and
PyTorch decode, crop and flip JPEGs. Our store holds decoded images; cropping and flipping are part
of the train step. "pread" reads the store's bytes and nothing else, which bounds what any reader
could reach.
"""

import importlib.util
import os
import random
import tempfile
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import photographs
from harness import CORES, Make, Row, parser, ratio, row, show, take_turns, write
from PIL import Image

SIZE = 256  # pixels along a side of the stored images
CROP = 224  # ... and of those that tf.data and PyTorch deliver
IMAGE_BYTES = SIZE * SIZE * 3
CLASSES = 10
WARM_UP = max(8, 4 * CORES)  # more batches than any contender prefetches
TF_THREADS = 48  # as in Flax's ImageNet example

TF_DATA, HOST, DEVICE = "tf.data, JPEG", "store, host batches", "store, device arrays"
PREAD = "pread"


class Data(NamedTuple):
    """The same photographs in three forms."""

    jpegs: Path  # folder of JPEG files
    store: str
    jpeg_store: str  # with storage=jpeg


def write_data(root: Path, images: int) -> Data:
    """Writes the JPEG files and prepares both stores."""
    from alexnet_jax.config import default_config
    from alexnet_jax.data.prepare import open_or_prepare

    photographs.write_folder(root / "jpegs", {"train": images, "val": CLASSES}, CLASSES)
    config = default_config()
    config.dataset, config.data_dir = f"folder:{root / 'jpegs'}", str(root / "stores")
    config.eval_split, config.image_size = "val", SIZE
    store = open_or_prepare(config)["train"]
    config.storage = "jpeg"
    jpeg_store = open_or_prepare(config)["train"]
    return Data(root / "jpegs/train", store.path, jpeg_store.path)


def contenders(data: Data, batch_size: int) -> dict[str, Make]:
    """Returns all contenders that are installed."""
    jpeg_data = data._replace(store=data.jpeg_store)
    found = {
        TF_DATA: partial(tf_data, data, batch_size),
        "PyTorch DataLoader, JPEG": partial(torch_loader, data, batch_size),
        "jpeg store, host batches": partial(from_store, jpeg_data, batch_size, on_device=False),
        "store through TensorStore": partial(tensorstore, data, batch_size),
        HOST: partial(from_store, data, batch_size, on_device=False),
        DEVICE: partial(from_store, data, batch_size, on_device=True),
        PREAD: partial(pread, data, batch_size),
    }
    if not importlib.util.find_spec("torch"):
        del found["PyTorch DataLoader, JPEG"]
    return found


def tf_data(data: Data, batch_size: int) -> Generator[int]:
    """Random-resized crops as in Flax's ImageNet example: uint8[B, 224, 224, 3] and labels."""
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")
    files, labels = zip(*photographs.files_and_labels(data.jpegs), strict=True)
    options = tf.data.Options()
    options.threading.private_threadpool_size = TF_THREADS
    batches = (
        tf.data.Dataset.from_tensor_slices((list(map(str, files)), list(labels)))
        .shuffle(len(files))
        .repeat()
        .map(_tf_random_crop, num_parallel_calls=tf.data.AUTOTUNE)
        .batch(batch_size, drop_remainder=True)
        .prefetch(2)  # AUTOTUNE would double the depth with every pause between turns
        .with_options(options)
    )
    for _, label in batches.as_numpy_iterator():
        yield len(label)


def _tf_random_crop(file, label):
    """Decodes only the random part of a JPEG, resizes it and flips it."""
    import tensorflow as tf

    content = tf.io.read_file(file)
    start, extent, _ = tf.image.sample_distorted_bounding_box(
        tf.image.extract_jpeg_shape(content),
        bounding_boxes=tf.zeros([1, 0, 4]),
        area_range=(0.08, 1.0),
        max_attempts=10,
        use_image_if_no_bounding_boxes=True,
    )
    window = tf.concat([start[:2], extent[:2]], axis=0)
    image = tf.io.decode_and_crop_jpeg(content, window, channels=3)
    image = tf.image.resize(image, (CROP, CROP), method="bicubic")
    image = tf.image.random_flip_left_right(tf.saturate_cast(tf.round(image), tf.uint8))
    return image, label


def torch_loader(data: Data, batch_size: int) -> Generator[int]:
    """Random-resized crops as in torchvision: uint8[B, 3, 224, 224] and labels."""
    from torch.utils.data import DataLoader, RandomSampler

    images = _TorchImages(photographs.files_and_labels(data.jpegs))
    endless = RandomSampler(images, replacement=True, num_samples=2**40)
    for _, label in DataLoader(images, batch_size, sampler=endless, num_workers=CORES):
        yield len(label)


class _TorchImages(list):
    """A PyTorch dataset: torchvision's RandomResizedCrop, RandomHorizontalFlip, PILToTensor."""

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        file, label = super().__getitem__(index)
        with Image.open(file) as picture:
            picture = picture.convert("RGB")
        picture = picture.crop(_torchvision_box(picture.width, picture.height))
        picture = picture.resize((CROP, CROP), Image.Resampling.BILINEAR)  # antialiases
        if random.random() < 0.5:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return np.array(picture).transpose(2, 0, 1), label


def _torchvision_box(width: int, height: int) -> tuple[int, int, int, int]:
    """Returns left, top, right, bottom: 8 to 100 % of the area, 3:4 to 4:3."""
    for _ in range(10):
        area = width * height * random.uniform(0.08, 1)
        ratio = (4 / 3) ** random.uniform(-1, 1)
        w, h = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            left, top = random.randint(0, width - w), random.randint(0, height - h)
            return left, top, left + w, top + h
    return 0, 0, width, height  # no photograph here is wider than 4:3


def from_store(data: Data, batch_size: int, on_device: bool) -> Generator[int]:
    """Ours: uint8[B, 256, 256, 3] and labels, in host memory or on the first device."""
    import jax

    from alexnet_jax.data.pipeline import Order, train_batches
    from alexnet_jax.data.store import open_store

    place = {"place": jax.device_put} if on_device else {}
    for batch in train_batches(Order(open_store(data.store), batch_size, 0), **place):
        yield len(jax.block_until_ready(batch)["label"])


def tensorstore(data: Data, batch_size: int) -> Generator[int]:
    """Our store as any program can open it: one read per batch, four in flight."""
    import tensorstore as ts

    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{data.store}/image/"}}
    images = ts.open(spec, open=True).result()
    rng = np.random.default_rng(0)
    reads = [images[rng.integers(images.shape[0], size=batch_size)].read() for _ in range(4)]
    while True:
        reads.append(images[rng.integers(images.shape[0], size=batch_size)].read())
        yield len(reads.pop(0).result())


def pread(data: Data, batch_size: int) -> Generator[int]:
    """Reads random images' bytes from the shards into one reused batch, on all cores."""
    from alexnet_jax.data.shards import CHECKSUM_BYTES, shard_key
    from alexnet_jax.data.store import open_store

    store = open_store(data.store)
    shards = range(len(store.shard_bytes))
    files = [os.open(Path(store.path, shard_key(shard)), os.O_RDONLY) for shard in shards]
    buffer = np.empty((batch_size, IMAGE_BYTES), np.uint8)

    def fill(images: np.ndarray, rng: random.Random) -> int:
        for image in images:
            shard, index = divmod(rng.randrange(store.num_examples), store.slots_per_shard)
            os.preadv(files[shard], [image], index * (IMAGE_BYTES + CHECKSUM_BYTES))
        return len(images)

    parts = np.array_split(buffer, CORES)
    rngs = [random.Random(thread) for thread in range(CORES)]
    with ThreadPoolExecutor(CORES) as pool:
        while True:
            yield sum(pool.map(fill, parts, rngs))


def plot(rows: Sequence[Row], ratios: Mapping[str, Row], path: Path) -> None:
    """Draws one bar per contender: median images per second, and their range."""
    from matplotlib.figure import Figure

    names, medians = [of["what"] for of in rows], [of["median"] for of in rows]
    ends = [[abs(of["median"] - of[end]) for of in rows] for end in ("min", "max")]
    figure = Figure(figsize=(9, 0.45 * len(rows) + 0.8), layout="constrained")
    axes = figure.subplots()
    colors = ["tab:blue" if name in (HOST, DEVICE) else "silver" for name in names]
    bars = axes.barh(names, medians, xerr=ends, color=colors, ecolor="dimgray")
    labels = [f"{of['median']:,.0f}  ({ratios[of['what']]['median']:.1f}×)" for of in rows]
    axes.bar_label(bars, labels, padding=6)
    axes.invert_yaxis()  # the first on top
    axes.set(xlabel=f"images/s on {CORES} cores  (× {TF_DATA})")
    axes.margins(x=0.28)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100)


def main() -> None:
    options = parser(__doc__, quick="few images, short turns")
    options.add_argument("--plot", type=Path, metavar="FILE.png")
    options.add_argument("--images", type=int, default=4096, help="default: 4096")
    options.add_argument("--batch-size", type=int, default=128, help="default: 128")
    options.add_argument("--seconds", type=float, default=4.0, help="of each turn; default: 4")
    args = options.parse_args()
    if args.quick:
        args.images, args.batch_size, args.seconds = 64, 8, 0.05
    with tempfile.TemporaryDirectory() as folder:
        makers = contenders(write_data(Path(folder), args.images), args.batch_size)
        rounds = 2 if args.quick else 5
        turns = take_turns(makers, rounds, args.seconds, warm_up=WARM_UP, group=CORES)
    fields = {"batch": args.batch_size, "dtype": "uint8"}
    rates = {name: [turn.rate for turn in of] for name, of in turns.items()}
    ratios = {
        name: ratio(f"{name} / tf.data", rate, rates[TF_DATA], **fields)
        for name, rate in rates.items()
    }
    speeds = [row(name, rate, "images/s", **fields) for name, rate in rates.items()]
    rows = [*speeds, *ratios.values(), ratio("store / pread", rates[HOST], rates[PREAD], **fields)]
    for name, of in turns.items():
        rows.append(row(name, [turn.cpu for turn in of], "CPU µs/image", **fields))
        rows.append(row(name, [of[-1].peak_bytes / 1e6], "MB at most", **fields))
    show(rows)
    write(rows, args.json)
    if args.plot:
        plot(speeds, ratios, args.plot)


if __name__ == "__main__":
    main()
