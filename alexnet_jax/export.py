"""A trained network in a file for other programs: the suffix chooses what the file holds.

    python -m alexnet_jax.export runs/quickstart digits.jaxexport

FILE.jaxexport is a program for jax.export, from uint8 images to probabilities, preprocessing
inside, of any batch size, for CPU, CUDA and TPU; FILE.jaxexport.json beside tells what its input
and output mean. FILE.onnx is the same for onnxruntime, FILE.safetensors the parameters; these two
hold what the JSON tells in their own metadata.
"""

import argparse
import json
import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jax import Array
from jaxtyping import Float32, UInt8

from alexnet_jax import config as configs
from alexnet_jax import inference as trained
from alexnet_jax.inference import Trained
from alexnet_jax.utils import process as runtime
from alexnet_jax.utils.errors import UserError, exits_cleanly
from alexnet_jax.utils.files import atomic_write, explain_write_errors

PLATFORMS = ("cpu", "cuda", "tpu")
FORMATS = (".jaxexport", ".onnx", ".safetensors")


def probabilities(
    network: Trained, views: str
) -> Callable[[UInt8[Array, "B S S 3"]], Float32[Array, "B classes"]]:
    """Returns stored images -> probabilities, a pure function for any B.

    Args:
      views: "center" or "ten".
    """

    def of_images(images: Array) -> Array:
        return jnp.exp(trained.log_probs(network, views, network.variables, images))

    return of_images


def program(network: Trained, views: str, platforms: Sequence[str]) -> jax.export.Exported:
    """Returns `probabilities` lowered for the platforms, parameters inside, for any batch."""
    (batch,) = jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *image_shape(network)), jnp.uint8)
    return jax.export.export(jax.jit(probabilities(network, views)), platforms=platforms)(images)


def arrays(network: Trained) -> dict[str, np.ndarray]:
    """Returns all of a network by names like conv1.kernel, bn1.mean and statistics.mean."""
    found = {}
    for tree in (*network.variables.values(), {"statistics": network.stats._asdict()}):
        for path, x in jax.tree_util.tree_leaves_with_path(tree):
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            found[name] = np.asarray(x)
    return found


def image_shape(network: Trained) -> tuple[int, int, int]:
    size = network.config.image_size
    return size, size, 3


def description(network: Trained, **others: Any) -> dict[str, Any]:
    """Returns what the network is and what its input and output mean, as JSON's types.

    Args:
      others: what else to tell, before the config, which is long.
    """
    size, classes = network.config.image_size, network.config.model.num_classes
    return {
        "variant": network.config.model.variant,
        "step": network.step,
        "class_names": list(network.class_names),
        "input": {
            "name": "images",
            "dtype": "uint8",
            "shape": ["batch", size, size, 3],
            "meaning": f"RGB, 0 to 255, rows from the top: the picture upright, its shorter side "
            f"scaled to {size} pixels with antialiasing, the central square of it",
        },
        "output": {
            "name": "probabilities",
            "dtype": "float32",
            "shape": ["batch", classes],
            "meaning": "of each class in the order of class_names; they sum to 1",
        },
        **others,
        "config": json.loads(configs.to_json(network.config)),
    }


def jaxexport_files(
    network: Trained, file: Path, views: str, platforms: Sequence[str]
) -> dict[Path, bytes]:
    """Returns the contents of the program's file and of the JSON beside it."""
    exported = program(network, views, platforms)
    told = description(
        network,
        views=views,
        platforms=exported.platforms,
        jax_version=jax.__version__,
        calling_convention_version=exported.calling_convention_version,
    )
    beside = file.with_name(f"{file.name}.json")
    text = json.dumps(told, indent=2, ensure_ascii=False) + "\n"
    return {file: bytes(exported.serialize()), beside: text.encode()}


def safetensors_bytes(network: Trained) -> bytes:
    """Returns the file of all arrays, and of what they are."""
    layouts = {
        "conv*.kernel": "[height, width, inputs / groups, outputs]",
        "fc*.kernel": "[inputs, outputs]; fc6's inputs are pool5's [height, width, channels]",
        "statistics.mean": "subtracted from the pixels; then times pixel_scale and channel_scale",
    }
    told = description(network, layout=layouts)
    return safetensors.numpy.save(arrays(network), _texts(told))


def onnx_bytes(network: Trained, views: str) -> bytes:
    """Returns the model's file. Raises UserError if the converter is not installed."""
    try:
        import onnx

        from alexnet_jax.weights import onnx as onnx_graph
    except ModuleNotFoundError as error:
        raise UserError(
            f"{error.name} is not installed, which makes ONNX files; run in a checkout "
            "pip install --no-deps -r requirements-export.txt"
        ) from error
    for library in ("onnx_ir", "jax2onnx"):  # shapes left out; parts for libraries not installed
        logging.getLogger(library).setLevel(logging.ERROR)
    # onnxruntime has no convolution of bfloat16 on CPU; the parameters are float32 anyway.
    network = network._replace(model=network.model.clone(dtype="float32"))
    model = onnx_graph.convert(probabilities(network, views), image_shape(network))
    onnx.helper.set_model_props(model, _texts(description(network, views=views)))
    onnx.checker.check_model(model, full_check=True)
    content: bytes = model.SerializeToString()
    return content


def _texts(told: dict[str, Any]) -> dict[str, str]:
    """Metadata in files of other libraries are texts by name; what is no text becomes JSON."""
    return {
        name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for name, value in told.items()
    }


def write_whole(files: dict[Path, bytes]) -> None:
    """Writes files beside each other, each whole or not at all, and none before all are written."""
    folder = next(iter(files)).parent
    with explain_write_errors(folder, "another FILE"), ExitStack() as all_written:
        folder.mkdir(parents=True, exist_ok=True)
        for path, content in files.items():
            all_written.enter_context(atomic_write(path)).write_bytes(content)


def export(
    network: Trained, file: Path, views: str = "center", platforms: Sequence[str] = PLATFORMS
) -> list[Path]:
    """Writes a network into a file of the format that its suffix names; returns what it wrote.

    Args:
      views: what the probabilities are of, "center" or "ten"; a .safetensors file has none.
      platforms: out of PLATFORMS, those that a .jaxexport file is for.
    """
    match file.suffix:
        case ".jaxexport":
            files = jaxexport_files(network, file, views, platforms)
        case ".safetensors":
            files = {file: safetensors_bytes(network)}
        case ".onnx":
            files = {file: onnx_bytes(network, views)}
        case _:
            raise ValueError(f"{file} ends in none of {FORMATS}")
    write_whole(files)
    return list(files)


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m alexnet_jax.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("workdir", type=Path, help="of train.py or alexnet_jax.convert")
    parser.add_argument("file", type=Path, metavar="FILE", help=f"ends in {', '.join(FORMATS)}")
    parser.add_argument("--step", type=int, help="of the checkpoint; default: the best by top-1")
    parser.add_argument(
        "--views",
        choices=["center", "ten"],
        help="the centre crop, or the paper's average over ten views; default: center",
    )
    parser.add_argument(
        "--platforms",
        metavar="LIST",
        help=f"of FILE.jaxexport, out of {','.join(PLATFORMS)}; default: all of them",
    )
    args = parser.parse_args(argv)
    file = args.file.expanduser()
    _check(file, args)
    platforms = _chosen(args.platforms) if args.platforms else PLATFORMS
    runtime.set_up()
    network = trained.load(args.workdir, args.step)
    for path in export(network, file, args.views or "center", platforms):
        print(f"wrote {path}, {path.stat().st_size:,} bytes")


def _check(file: Path, args: argparse.Namespace) -> None:
    """Raises UserError for what cannot be, before anything is loaded."""
    if file.suffix not in FORMATS:
        raise UserError(f"{file} must end in {', '.join(FORMATS)}: that chooses the format")
    if file.is_dir():
        raise UserError(f"{file} is a folder; name a file")
    if args.platforms and file.suffix != ".jaxexport":
        raise UserError(f"--platforms is for a .jaxexport file, not for {file}; leave it out")
    if args.views and file.suffix == ".safetensors":
        raise UserError(f"{file} holds parameters and no views of images; leave --views out")


def _chosen(platforms: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(platforms.split(",")))
    for name in names:
        if name not in PLATFORMS:
            raise UserError(f"--platforms {platforms}: {name!r} is none of {', '.join(PLATFORMS)}")
    return names


if __name__ == "__main__":
    main()
