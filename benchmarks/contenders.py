"""What delivers images: tf.data, PyTorch, the store, and what the machine could do at most.

Each contender is an endless iterator that yields how many images it has just delivered. It imports
its library only when it runs, so that the memory of a process is that of one contender.
"""

import importlib.util
import os
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import photographs
from PIL import Image
from turns import CORES, Make

SIZE = 256  # pixels along a side of the stored images
CROP = 224  # ... and of those that tf.data and PyTorch make
IMAGE_BYTES = SIZE * SIZE * 3
CLASSES = 10
TF_THREADS = 48  # as Flax's ImageNet example
SOURCE_ROWS = 2800  # 550 MB, more than a processor's cache
PASSES = 8  # over a reference's buffer in one hand-over to its threads

TF_DATA, TORCH = "tf.data, from JPEG", "PyTorch DataLoader, from JPEG"
HOST, DEVICE = "store, to host batches", "store, to device arrays"
JPEG, TENSORSTORE = "jpeg store, to host batches", "store, through TensorStore"
COPY_ONE, COPY_ALL = "memcpy, one thread", "memcpy, all cores"
PREAD, CHECKSUM = "pread, all cores", "crc32c, one thread"
REFERENCES = (COPY_ONE, COPY_ALL, PREAD, CHECKSUM)
ON_ONE_CORE = (COPY_ONE, CHECKSUM)


class Data(NamedTuple):
    """The same photographs three times."""

    jpegs: Path  # a folder of JPEG files
    records: Path  # where tf.data's process writes its TFRecords
    store: str  # where the prepared store lies
    jpeg_store: str  # ... and the one of storage=jpeg
    store_bytes: int  # in its shard files


def write_data(root: Path, images: int) -> Data:
    """Writes the JPEG files, and prepares the store from them."""
    from alexnet_jax.config import default_config
    from alexnet_jax.store import open_or_prepare

    photographs.write_folder(root / "jpegs", {"train": images, "val": CLASSES}, CLASSES)
    config = default_config()
    config.dataset, config.data_dir = f"folder:{root / 'jpegs'}", str(root / "stores")
    config.eval_split, config.image_size = "val", SIZE
    store = open_or_prepare(config)["train"]
    config.storage = "jpeg"
    jpeg_store = open_or_prepare(config)["train"]
    paths = (root / "jpegs/train", root / "records", store.path, jpeg_store.path)
    return Data(*paths, sum(store.shard_bytes))


def makers(data: Data, batch_size: int) -> dict[str, Make]:
    """Returns all contenders that can run here."""
    functions = {
        TF_DATA: tf_data,
        TORCH: torch_loader,
        JPEG: from_jpeg_store,
        TENSORSTORE: tensorstore,
        HOST: partial(from_store, on_device=False),
        DEVICE: partial(from_store, on_device=True),
        COPY_ONE: partial(memcpy, threads=1),
        COPY_ALL: partial(memcpy, threads=CORES),
        PREAD: pread,
        CHECKSUM: crc32c_one,
    }
    if not importlib.util.find_spec("torch"):
        print(f"without {TORCH}, since torch is not installed")
        del functions[TORCH]
    return {name: partial(function, data, batch_size) for name, function in functions.items()}


def tf_data(data: Data, batch_size: int) -> Iterator[int]:
    """Random-resized crops as Flax's ImageNet example makes them: uint8[B, 224, 224, 3], labels."""
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")
    auto = tf.data.AUTOTUNE
    records = photographs.write_records(photographs.files_and_labels(data.jpegs), data.records)
    files = tf.data.Dataset.from_tensor_slices([str(record) for record in records])
    batches = (
        files.shuffle(len(records))
        .repeat()
        .interleave(tf.data.TFRecordDataset, num_parallel_calls=auto, deterministic=False)
        .shuffle(16 * batch_size)
        .map(_tf_random_crop, num_parallel_calls=auto)
        .batch(batch_size, drop_remainder=True)
        .prefetch(2)  # AUTOTUNE doubles its depth with every pause between the turns
    )
    options = tf.data.Options()
    options.threading.private_threadpool_size = TF_THREADS
    for batch in batches.with_options(options).as_numpy_iterator():
        yield len(batch["label"])


def _tf_random_crop(record):
    """Parses one tf.train.Example, decodes only a random part of its JPEG, scales and flips it."""
    import tensorflow as tf

    types = {"image": tf.string, "label": tf.int64}
    features = {name: tf.io.FixedLenFeature([], kind) for name, kind in types.items()}
    example = tf.io.parse_single_example(record, features)
    start, extent, _ = tf.image.sample_distorted_bounding_box(
        tf.image.extract_jpeg_shape(example["image"]),
        bounding_boxes=tf.zeros([1, 0, 4]),
        area_range=(0.08, 1.0),
        max_attempts=10,
        use_image_if_no_bounding_boxes=True,
    )
    window = tf.concat([start[:2], extent[:2]], axis=0)
    part = tf.io.decode_and_crop_jpeg(example["image"], window, channels=3)
    image = tf.image.resize(part, (CROP, CROP), method="bicubic")
    image = tf.image.random_flip_left_right(tf.saturate_cast(tf.round(image), tf.uint8))
    return {"image": image, "label": example["label"]}


def torch_loader(data: Data, batch_size: int) -> Iterator[int]:
    """Random-resized crops as torchvision makes them: uint8[B, 3, 224, 224] with labels."""
    from torch.utils.data import DataLoader, RandomSampler

    images = _TorchImages(photographs.files_and_labels(data.jpegs))
    endless = RandomSampler(images, replacement=True, num_samples=2**40)
    for _, label in DataLoader(images, batch_size, sampler=endless, num_workers=CORES):
        yield len(label)


class _TorchImages(list):
    """Files and labels as a data set in PyTorch's sense, of random-resized crops.

    RandomResizedCrop, RandomHorizontalFlip and PILToTensor of torchvision with its defaults.
    """

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
    return 0, 0, width, height  # whole, since no photograph here is wider than 4:3


def from_store(data: Data, batch_size: int, on_device: bool) -> Iterator[int]:
    """Ours: uint8[B, 256, 256, 3] with labels, in host memory or as arrays of the first device."""
    import jax

    from alexnet_jax.data.pipeline import train_batches
    from alexnet_jax.store import open_store

    place = {"place": jax.device_put} if on_device else {}
    for batch in train_batches(open_store(data.store), batch_size, 0, **place):
        yield len(jax.block_until_ready(batch)["label"])


def from_jpeg_store(data: Data, batch_size: int) -> Iterator[int]:
    """Ours again, from shards of JPEGs."""
    return from_store(data._replace(store=data.jpeg_store), batch_size, on_device=False)


def tensorstore(data: Data, batch_size: int) -> Iterator[int]:
    """The raw store as any program opens it: a batch is one read, four are in flight."""
    import tensorstore as ts

    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{data.store}/image/"}}
    images = ts.open(spec, open=True).result()
    rng = np.random.default_rng(0)
    reads = [images[rng.integers(images.shape[0], size=batch_size)].read() for _ in range(4)]
    while True:
        reads.append(images[rng.integers(images.shape[0], size=batch_size)].read())
        yield len(reads.pop(0).result())


def memcpy(data: Data, batch_size: int, threads: int) -> Iterator[int]:
    """Copies rows of an image's size from random places of a large array into one batch's."""
    source = np.empty((SOURCE_ROWS, IMAGE_BYTES), np.uint8)
    source[:] = np.random.default_rng(0).integers(256, size=IMAGE_BYTES, dtype=np.uint8)

    def copy(row: np.ndarray, place: int) -> None:
        row[:] = source[place]

    return _in_threads(copy, SOURCE_ROWS, batch_size, threads)


def pread(data: Data, batch_size: int) -> Iterator[int]:
    """Reads random images' bytes out of the store's shards into one batch's memory."""
    from alexnet_jax.data.shards import CHECKSUM_BYTES, rows_per_shard, shard_key
    from alexnet_jax.store import open_store

    store = open_store(data.store)
    shards = range(len(store.shard_bytes))
    files = [os.open(Path(store.path, shard_key(shard)), os.O_RDONLY) for shard in shards]

    def read(row: np.ndarray, place: int) -> None:
        shard, index = divmod(place, rows_per_shard(SIZE))
        os.preadv(files[shard], [row], index * (IMAGE_BYTES + CHECKSUM_BYTES))

    return _in_threads(read, store.num_examples, batch_size, CORES)


def _in_threads(
    fill: Callable[[np.ndarray, int], None], places: int, batch_size: int, threads: int
) -> Iterator[int]:
    """Lets each thread fill its rows of uint8[B, bytes] from random places < `places`."""
    buffer = np.empty((batch_size, IMAGE_BYTES), np.uint8)
    shares = [list(share) for share in np.array_split(buffer, threads)]
    chances = [random.Random(thread) for thread in range(threads)]

    def fill_share(share: list[np.ndarray], chance: random.Random) -> int:
        for _ in range(PASSES):
            for row in share:
                fill(row, int(chance.random() * places))
        return PASSES * len(share)

    with ThreadPoolExecutor(threads) as pool:
        while True:
            yield sum(pool.map(fill_share, shares, chances))


def crc32c_one(data: Data, batch_size: int) -> Iterator[int]:
    """Takes the checksum of one image's bytes, which stay in the cache, as just-read ones do."""
    from crc32c import crc32c

    image = np.random.default_rng(0).integers(256, size=IMAGE_BYTES, dtype=np.uint8)
    return _in_threads(lambda row, place: crc32c(image), 1, batch_size, threads=1)
