"""Exports a trained network to a file for other programs. The suffix of FILE selects the format.

    python -m alexnet_jax.export runs/quickstart digits.jaxexport

  .jaxexport    a program for jax.export with weights and preprocessing, from uint8 images to
                probabilities, for any batch size, on CPU, CUDA and TPU; FILE.jaxexport.json
                describes its input and output
  .onnx         the same for onnxruntime
  .safetensors  the parameters

The .onnx and .safetensors files contain the description as metadata.

For other compilers, of a config without weights, or of the config of a workdir:

    python -m alexnet_jax.export --stablehlo training step.mlir --config imagenet

  .mlir         a StableHLO program as text; FILE.mlir.json names its arguments and results
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
from alexnet_jax import inference
from alexnet_jax.analysis import stablehlo
from alexnet_jax.data import augment
from alexnet_jax.data.preprocess import PREPROCESSING
from alexnet_jax.inference import Trained
from alexnet_jax.utils import buckets, process
from alexnet_jax.utils.errors import UserError, exits_cleanly
from alexnet_jax.utils.files import atomic_write, explain_write_errors

PLATFORMS = ("cpu", "cuda", "tpu")
FORMATS = (".jaxexport", ".onnx", ".safetensors")
STABLEHLO = ".mlir"


def export(
    network: Trained, file: Path, views: str = "center", platforms: Sequence[str] = PLATFORMS
) -> list[Path]:
    """Writes a network to a file whose suffix selects the format; returns the files written.

    Args:
      views: "center" or "ten": what the probabilities are computed from. A .safetensors file
        contains no computation.
      platforms: of `PLATFORMS`; for .jaxexport.

    Raises:
      UserError: the file cannot be written, or the converter to ONNX is not installed.
    """
    match file.suffix.lower():
        case ".jaxexport":
            files = _jaxexport_files(network, file, views, platforms)
        case ".safetensors":
            files = {file: _safetensors_bytes(network)}
        case ".onnx":
            files = {file: _onnx_bytes(network, views)}
        case _:
            raise ValueError(f"{file} must end in {', '.join(FORMATS)}")
    with explain_write_errors(file.parent, "another FILE"), ExitStack() as all_written:
        file.parent.mkdir(parents=True, exist_ok=True)
        for path, content in files.items():  # none takes its name before all are written
            all_written.enter_context(atomic_write(path)).write_bytes(content)
    return list(files)


def probabilities(
    network: Trained, views: str
) -> Callable[[UInt8[Array, "B S S 3"]], Float32[Array, "B classes"]]:
    """Returns a pure function from stored images to probabilities, for any batch size.

    Args:
      views: "center" or "ten".
    """

    def of_images(images: Array) -> Array:
        return jnp.exp(inference.log_probs(network, views, network.variables, images))

    return of_images


def program(network: Trained, views: str, platforms: Sequence[str]) -> jax.export.Exported:
    """Returns `probabilities` lowered for the platforms, with the parameters as constants."""
    (batch,) = jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *_image_shape(network)), jnp.uint8)
    return jax.export.export(jax.jit(probabilities(network, views)), platforms=platforms)(images)


def _jaxexport_files(
    network: Trained, file: Path, views: str, platforms: Sequence[str]
) -> dict[Path, bytes]:
    exported = program(network, views, platforms)
    description = _description(
        network,
        views=views,
        platforms=exported.platforms,
        jax_version=jax.__version__,
        calling_convention_version=exported.calling_convention_version,
    )
    text = json.dumps(description, indent=2, ensure_ascii=False) + "\n"
    return {
        file: bytes(exported.serialize()),
        file.with_name(f"{file.name}.json"): text.encode(),
    }


def _safetensors_bytes(network: Trained) -> bytes:
    """Returns a file with all arrays, named for example conv1.kernel, bn1.mean, statistics.mean."""
    arrays = {}
    for tree in (*network.variables.values(), {"statistics": network.stats._asdict()}):
        for path, x in jax.tree_util.tree_leaves_with_path(tree):
            arrays[jax.tree_util.keystr(path, simple=True, separator=".")] = np.asarray(x)
    layout = {
        "conv*.kernel": "[height, width, inputs / groups, outputs]",
        "fc*.kernel": "[inputs, outputs]; fc6's inputs are pool5 as [height, width, channels]",
        "statistics.mean": "subtract it from the pixels, then multiply by pixel_scale and "
        "channel_scale of config.augment",
    }
    return safetensors.numpy.save(arrays, _metadata(_description(network, layout=layout)))


def _onnx_bytes(network: Trained, views: str) -> bytes:
    try:
        import onnx

        from alexnet_jax.weights import onnx as converter
    except ModuleNotFoundError as error:
        raise UserError(
            f"ONNX files need {error.name}, which is not installed; in a checkout run "
            "pip install --no-deps -r requirements-export.txt"
        ) from error
    for library in ("onnx_ir", "jax2onnx"):  # they warn of plugins for libraries not installed
        logging.getLogger(library).setLevel(logging.ERROR)
    # onnxruntime has no bfloat16 convolution on CPU. The parameters are float32 anyway.
    network = network._replace(model=network.model.clone(dtype="float32"))
    model = converter.convert(probabilities(network, views), _image_shape(network))
    onnx.helper.set_model_props(model, _metadata(_description(network, views=views)))
    onnx.checker.check_model(model, full_check=True)
    content: bytes = model.SerializeToString()
    return content


def _image_shape(network: Trained) -> tuple[int, int, int]:
    size = network.config.image_size
    return size, size, 3


def _description(network: Trained, **details: Any) -> dict[str, Any]:
    """Returns what the network is and what its input and output mean, for JSON.

    Args:
      details: further entries, placed before the config, which is long.
    """
    size, num_classes = network.config.image_size, network.config.model.num_classes
    meaning = PREPROCESSING[network.config.preprocess].meaning
    return {
        "variant": network.config.model.variant,
        "ablation": list(network.config.model.ablation),
        "step": network.step,
        "class_names": list(network.class_names),
        "input": {
            "name": "images",
            "dtype": "uint8",
            "shape": ["batch", size, size, 3],
            "meaning": f"RGB from 0 to 255, top row first: {meaning.format(size=size)}",
        },
        "output": {
            "name": "probabilities",
            "dtype": "float32",
            "shape": ["batch", num_classes],
            "meaning": "of the classes in the order of class_names; each row sums to 1",
        },
        **details,
        "config": json.loads(configs.to_json(network.config)),
    }


def _metadata(description: dict[str, Any]) -> dict[str, str]:
    """ONNX and safetensors store metadata as strings; other values become JSON."""
    return {
        name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for name, value in description.items()
    }


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog="python -m alexnet_jax.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "workdir",
        type=buckets.readable,
        nargs="?",
        metavar="WORKDIR",
        help="workdir of a training run or of alexnet_jax.convert",
    )
    parser.add_argument(
        "file",
        type=buckets.local,
        metavar="FILE",
        help=f"ends in {', '.join(FORMATS)}, or {STABLEHLO} with --stablehlo",
    )
    parser.add_argument(
        "--step",
        type=int,
        help="step of the checkpoint; default: the best, or the newest if none was evaluated",
    )
    parser.add_argument(
        "--views",
        choices=augment.VIEWS,
        help="the center crop, or the average over nine crops or the paper's ten views; default: "
        "center",
    )
    parser.add_argument(
        "--preprocess",
        choices=PREPROCESSING,
        help="how the other program makes squares of images; default: that of the network",
    )
    parser.add_argument(
        "--platforms",
        metavar="LIST",
        help=f"platforms of a .jaxexport file (default: {','.join(PLATFORMS)}), or the one of a "
        "StableHLO program (default: cpu)",
    )
    parser.add_argument(
        "--stablehlo",
        choices=stablehlo.PROGRAMS,
        help="write this program of a config, with its parameters as arguments",
    )
    parser.add_argument(
        "--config",
        metavar="NAME",
        help="for --stablehlo without WORKDIR: a bundled config or a file; any field can be set, "
        "such as --config.model.variant=owt, --config.model.dtype=bfloat16, --config.batch_size=8",
    )
    words, overrides = configs.split_overrides(argv)
    args = parser.parse_args(words)
    file = args.file.expanduser()
    if args.stablehlo or args.config or overrides:
        _write_stablehlo(file, args, overrides)
        return
    if args.workdir is None:
        raise UserError(f"name a workdir before {file}, or --stablehlo and --config NAME")
    platforms = _check(file, args)
    process.set_up()
    network = inference.load(args.workdir, args.step, needs_classes=True)
    network = inference.with_preprocess(network, args.preprocess)
    for path in export(network, file, args.views or "center", platforms):
        print(f"wrote {path}, {path.stat().st_size:,} bytes")


def _write_stablehlo(
    file: Path, args: argparse.Namespace, overrides: Sequence[tuple[str, str]]
) -> None:
    if args.stablehlo is None or file.suffix.lower() != STABLEHLO or file.is_dir():
        raise UserError(f"--stablehlo PROGRAM and a FILE that ends in {STABLEHLO} belong together")
    if (args.workdir is None) == (args.config is None) or (overrides and not args.config):
        raise UserError("--stablehlo needs either a workdir or --config NAME")
    platform = args.platforms or "cpu"
    if platform not in PLATFORMS:
        raise UserError(f"--platforms {platform} must be one of {', '.join(PLATFORMS)}")
    if args.views or args.step is not None:
        raise UserError("--stablehlo writes no weights and one view; omit --views and --step")
    if args.config:
        config = configs.load(args.config, overrides)
        configs.check_bounds(config)
    else:
        config = inference.saved_config(args.workdir)
    process.set_up()
    program = stablehlo.lower(config, args.stablehlo, platform)
    description = file.with_name(f"{file.name}.json")
    with explain_write_errors(file.parent, "another FILE"), ExitStack() as all_written:
        file.parent.mkdir(parents=True, exist_ok=True)
        for path, text in ((file, program.text), (description, program.description)):
            all_written.enter_context(atomic_write(path)).write_text(text)
    for path in (file, description):
        print(f"wrote {path}, {path.stat().st_size:,} bytes")


def _check(file: Path, args: argparse.Namespace) -> tuple[str, ...]:
    """Checks the arguments before anything is loaded, and returns the platforms."""
    suffix = file.suffix.lower()
    if suffix not in FORMATS:
        raise UserError(f"{file} must end in {', '.join(FORMATS)}, which selects the format")
    if file.is_dir():
        raise UserError(f"{file} is a folder; name a file")
    if args.platforms and suffix != ".jaxexport":
        raise UserError(f"--platforms applies to .jaxexport, not to {file}; omit it")
    if args.views and suffix == ".safetensors":
        raise UserError(f"{file} contains parameters and no computation; omit --views")
    platforms = tuple(dict.fromkeys((args.platforms or ",".join(PLATFORMS)).split(",")))
    for name in platforms:
        if name not in PLATFORMS:
            raise UserError(
                f"--platforms {args.platforms}: {name!r} is not one of {', '.join(PLATFORMS)}"
            )
    return platforms


if __name__ == "__main__":
    main()
