"""How fast is a network after training: exported, by predict, and beside PyTorch and onnxruntime?

    python benchmarks/inference.py

Measures variant owt at full width in float32, with initial parameters.

1. Latency of a single image and throughput of batches, from uint8[B, 256, 256, 3] to probabilities,
   both NumPy arrays. Each contender has its own process and as many threads as the machine has
   cores, and they take turns. PyTorch and onnxruntime take part if they are installed
   (requirements-torch.txt, requirements-export.txt).
2. `alexnet_jax.predict` on JPEG files beside `alexnet_jax.evaluate` on the prepared store: the
   whole commands, including start and compilation, alternately on the same photographs.
"""

import importlib.util
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import photographs
from harness import CORES, ROOT, Row, parser, ratio, row, show, take_turns, write

SIZE, CROP = 256, 224
LATENCY_ROUNDS, ROUNDS, SECONDS = 50, 5, 4.0
BATCH = 64

Run = Callable[[np.ndarray], Any]


def calls(run: Run, batch: int) -> Generator[int]:
    """Yields the batch size after each call."""
    images = np.random.default_rng(0).integers(0, 256, (batch, SIZE, SIZE, 3), np.uint8)
    while True:
        assert len(run(images)) == batch
        yield batch


def exported(file: str, batch: int) -> Generator[int]:
    """The exported program, without this package."""
    import jax

    program = jax.jit(jax.export.deserialize(bytearray(Path(file).read_bytes())).call)
    yield from calls(lambda images: np.asarray(program(images)), batch)


def predict(workdir: str, batch: int) -> Generator[int]:
    """What `python -m alexnet_jax.predict` computes."""
    import our_step

    yield from calls(our_step.predictor(Path(workdir)), batch)


def pytorch(batch: int) -> Generator[int]:
    """Eager, channels last."""
    import torch
    import torch_alexnet

    torch.set_num_threads(CORES)
    model = torch_alexnet.network("owt").to(memory_format=torch.channels_last).eval()
    mean = torch.tensor([124.0, 117.0, 104.0])
    window = slice((SIZE - CROP) // 2, (SIZE + CROP) // 2)

    @torch.inference_mode()
    def run(images: np.ndarray) -> np.ndarray:
        view = torch.from_numpy(images)[:, window, window].float() - mean
        return torch.softmax(model(view.permute(0, 3, 1, 2)), dim=1).numpy()

    yield from calls(run, batch)


def onnxruntime(file: str, batch: int) -> Generator[int]:
    """The exported ONNX file."""
    import onnxruntime as ort

    settings = ort.SessionOptions()
    settings.intra_op_num_threads = CORES
    session = ort.InferenceSession(file, settings, providers=["CPUExecutionProvider"])
    yield from calls(lambda images: session.run(None, {"images": images})[0], batch)


def command(module: str, *words: str) -> float:
    """Returns the seconds that one command of the package takes."""
    started = time.perf_counter()
    argv = [sys.executable, "-m", f"alexnet_jax.{module}", *words]
    subprocess.run(argv, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def measure_arrays(workdir: Path, quick: bool) -> list[Row]:
    """Returns latencies, throughputs and memory of all contenders that are installed."""
    program, graph = f"{workdir}.jaxexport", f"{workdir}.onnx"
    command("export", str(workdir), program)
    makers: dict[str, Callable[[int], Generator[int]]] = {
        "exported": partial(exported, program),
        "predict": partial(predict, str(workdir)),
    }
    if importlib.util.find_spec("torch") and not quick:
        makers["PyTorch"] = pytorch
    if importlib.util.find_spec("jax2onnx") and not quick:
        command("export", str(workdir), graph)
        makers["onnxruntime"] = partial(onnxruntime, graph)
    single = {name: partial(make, 1) for name, make in makers.items()}
    latencies = take_turns(single, 3 if quick else LATENCY_ROUNDS, seconds=0, warm_up=3)
    rows = [
        row(f"latency, {name}", [1e3 / turn.rate for turn in turns], "ms", 1, "float32")
        for name, turns in latencies.items()
    ]
    batch = 4 if quick else BATCH
    batched = {name: partial(make, batch) for name, make in makers.items()}
    rounds, seconds = (2, 0.1) if quick else (ROUNDS, SECONDS)
    for name, turns in take_turns(batched, rounds, seconds).items():
        rates, memory = [turn.rate for turn in turns], [turns[-1].peak_bytes / 1e6]
        rows.append(row(f"throughput, {name}", rates, "images/s", batch, "float32"))
        rows.append(row(f"memory, {name}", memory, "MB at most", batch, "float32"))
    return rows


def measure_commands(workdir: Path, photos: Path, count: int, rounds: int) -> list[Row]:
    """Returns images per second of predict and evaluate, and their ratio."""
    command("evaluate", str(workdir))  # prepares the store
    predicted, evaluated = [], []
    for _ in range(rounds):
        evaluated.append(count / command("evaluate", str(workdir)))
        predicted.append(count / command("predict", str(workdir), str(photos / "val")))
    return [
        row("evaluate, from the store", evaluated, "images/s"),
        row("predict, from JPEG files", predicted, "images/s"),
        ratio("predict / evaluate", predicted, evaluated),
    ]


def main() -> None:
    options = parser(__doc__, quick="a narrow network, without PyTorch and onnxruntime")
    options.add_argument("--images", type=int, default=10_000, help="photographs; default: 10000")
    options.add_argument("--rounds", type=int, default=3, help="of the commands; default: 3")
    args = options.parse_args()
    import our_step

    count, rounds = (200, 1) if args.quick else (args.images, args.rounds)
    with tempfile.TemporaryDirectory() as folder:
        photos, workdir = Path(folder, "photos"), Path(folder, "owt")
        photographs.write_folder(photos, {"train": 10, "val": count})
        fields = {
            **{"dataset": f"folder:{photos}", "data_dir": folder, "eval_split": "val"},
            **{"model.variant": "owt", "model.width": 0.1 if args.quick else 1.0},
            "augment.mean": "channel",
        }
        our_step.save_untrained(workdir, fields)
        rows = measure_arrays(workdir, args.quick)
        rows += measure_commands(workdir, photos, count, rounds)
    show(rows)
    write(rows, args.json)


if __name__ == "__main__":
    main()
