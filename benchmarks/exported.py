"""Latency and throughput of an exported network on CPU, beside PyTorch and onnxruntime.

    python benchmarks/exported.py

`owt` of full size in float32, from uint8[B, 256, 256, 3] to probabilities, both of NumPy, with
crop, mean and softmax. Every contender has a process of its own and as many threads as the machine
has cores; they take turns. A latency is that of one call of one image, after warm-up calls; a
throughput is that of a turn of some seconds. PyTorch takes part if it is installed
(requirements-torch.txt), onnxruntime if it and the converter are (requirements-export.txt).
"""

import argparse
import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from rows import Row, options, row, write  # noqa: E402
from turns import CORES, Make, Turn, take_turns  # noqa: E402

SIZE, CROP = 256, 224
MEAN = (124.0, 117.0, 104.0)  # any: it takes no time more or less
LATENCY_CALLS, WARM_UP = 50, 3
BATCH, ROUNDS, SECONDS = 64, 5, 4.0

Run = Callable[[np.ndarray], Any]


def network(width: float) -> Any:
    """Returns an untrained `owt`."""
    import jax

    from alexnet_jax.config import default_config
    from alexnet_jax.data.augment import Statistics
    from alexnet_jax.inference import Trained, unnamed
    from alexnet_jax.training import sharding as parallel
    from alexnet_jax.training import train_step as step

    config = default_config()
    config.model.variant, config.model.width, config.augment.mean = "owt", width, "channel"
    config.image_size, config.augment.crop_size = SIZE, CROP
    model = parallel.build_model(config)
    params = jax.jit(lambda: step.init_state(model, config).params)()
    stats = Statistics(np.float32(MEAN), np.zeros((3, 3), np.float32))
    names = tuple(map(unnamed, range(config.model.num_classes)))
    return Trained(config, model, {"params": params, "batch_stats": {}}, stats, names, 0)


def calls(run: Run, batch: int) -> Iterator[int]:
    """Yields the batch size after each call, endlessly."""
    images = np.random.default_rng(0).integers(0, 256, (batch, SIZE, SIZE, 3), np.uint8)
    assert np.shape(run(images))[0] == batch
    while True:
        run(images)
        yield batch


def exported(file: str, batch: int) -> Iterator[int]:
    """As a program without this package loads it."""
    import jax

    program = jax.jit(jax.export.deserialize(bytearray(Path(file).read_bytes())).call)
    return calls(lambda images: np.asarray(program(images)), batch)


def predict(width: float, batch: int) -> Iterator[int]:
    """As `python -m alexnet_jax.predict` computes."""
    from alexnet_jax import inference as trained
    from alexnet_jax.utils import process as runtime

    runtime.set_up()
    log_probs = trained.classifier(network(width), "center")
    return calls(lambda images: np.exp(log_probs(images)), batch)


def pytorch(batch: int) -> Iterator[int]:
    """Eager, channels last."""
    import torch
    import torch_alexnet

    torch.set_num_threads(CORES)
    model = torch_alexnet.network("owt").to(memory_format=torch.channels_last).eval()
    start, mean = (SIZE - CROP) // 2, torch.tensor(MEAN)
    window = slice(start, start + CROP)

    @torch.inference_mode()
    def run(images: np.ndarray) -> np.ndarray:
        view = torch.from_numpy(images)[:, window, window].float() - mean
        return torch.softmax(model(view.permute(0, 3, 1, 2)), dim=1).numpy()

    return calls(run, batch)


def onnxruntime(file: str, batch: int) -> Iterator[int]:
    """The exported ONNX file."""
    import onnxruntime as ort

    settings = ort.SessionOptions()
    settings.intra_op_num_threads = CORES
    session = ort.InferenceSession(file, settings, providers=["CPUExecutionProvider"])
    return calls(lambda images: session.run(None, {"images": images})[0], batch)


def contenders(folder: str, quick: bool) -> dict[str, Callable[[int], Iterator[int]]]:
    """Writes the files; returns by name what takes a batch size and yields images."""
    from alexnet_jax import export

    width = 0.1 if quick else 1.0
    net = network(width)
    program, graph = f"{folder}/owt.jaxexport", f"{folder}/owt.onnx"
    export.export(net, Path(program))
    found: dict[str, Callable] = {"exported": partial(exported, program)}
    found["predict"] = partial(predict, width)
    if importlib.util.find_spec("torch") and not quick:
        found["PyTorch"] = pytorch
    if importlib.util.find_spec("jax2onnx") and not quick:
        export.export(net, Path(graph))
        found["onnxruntime"] = partial(onnxruntime, graph)
    return found


def latency_rows(makers: dict[str, Make], quick: bool) -> list[Row]:
    """Measures single calls of one image in turn."""
    found = take_turns(makers, 3 if quick else LATENCY_CALLS, 0.0, WARM_UP, together=1)
    return [
        row(f"latency, {name}", [1e3 / turn.rate for turn in turns], "ms", 1, "float32")
        for name, turns in found.items()
    ]


def throughput_rows(makers: dict[str, Make], batch: int, quick: bool) -> list[Row]:
    """Measures turns of some seconds."""
    rounds, seconds = (2, 0.1) if quick else (ROUNDS, SECONDS)
    found: dict[str, list[Turn]] = take_turns(makers, rounds, seconds, warm_up=1, together=1)
    rows = []
    for name, turns in found.items():
        rates = [turn.rate for turn in turns]
        rows.append(row(f"throughput, {name}", rates, "images/s", batch, "float32"))
        memory = [turns[-1].peak_bytes / 1e6]
        rows.append(row(f"peak memory, {name}", memory, "MB", batch, "float32"))
    return rows


def show(rows: list[Row]) -> None:
    for r in rows:
        what = f"{r['what']}, batch {r['batch']}"
        print(
            f"{what:38} {r['value']:8.1f} {r['unit']:8}  ({r['min']:.1f} to {r['max']:.1f})",
            flush=True,
        )


def measure(args: argparse.Namespace) -> list[Row]:
    """Prints and returns the rows."""
    batch = 4 if args.quick else BATCH
    with tempfile.TemporaryDirectory() as folder:
        makers = contenders(folder, args.quick)
        of_one = {name: partial(make, 1) for name, make in makers.items()}
        rows = latency_rows(of_one, args.quick)
        show(rows)
        of_batch = {name: partial(make, batch) for name, make in makers.items()}
        more = throughput_rows(of_batch, batch, args.quick)
        show(more)
    return rows + more


def main() -> None:
    """Prints the table, and writes rows if asked."""
    parser = options(__doc__, quick="a narrow network, without PyTorch and onnxruntime")
    args = parser.parse_args()
    write(measure(args), args.json)


if __name__ == "__main__":
    main()
