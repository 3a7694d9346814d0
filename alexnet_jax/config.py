"""Configs: every field with its meaning, and how a file and a command line change them.

A config is a Python file with `get_config()`, which takes `default_config()` and changes what
differs. Fork one freely. A field that does not exist is an error and never silently ignored.
"""

import argparse
import ast
import difflib
import json
import math
import runpy
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from ml_collections import ConfigDict

from alexnet_jax.utils.errors import UserError, one_line

_INSTALLED = Path(__file__).with_name("configs")
BUNDLED_CONFIGS = _INSTALLED if _INSTALLED.is_dir() else Path(__file__).parents[1] / "configs"

FOLDER_PREFIX = "folder:"  # of a `dataset` that is a folder of images
OPEN_ENDED_SCHEDULES = ("constant", "steps", "plateau")  # they do not depend on num_epochs

INFINITY = math.inf
TINY = 1e-6


class Field(NamedTuple):
    """A field of every config.

    Attributes:
      default: the value of the 2012 paper where it gives one. Its type is the field's.
      help: one line.
      least, most: bounds of a number.
      free: whether a run may resume with another value, because the result of the steps it has
        done does not depend on it.
    """

    default: Any
    help: str
    least: float = -INFINITY
    most: float = INFINITY
    free: bool = False


FIELDS = {
    "seed": Field(
        0, "decides about initialization, order of the data, augmentation and dropout", 0, 2**32 - 1
    ),
    "seeds.weights": Field(-1, "of the initialization; -1: seed", -1, 2**32 - 1),
    "seeds.order": Field(-1, "of the order of the data; -1: seed", -1, 2**32 - 1),
    "seeds.dropout": Field(-1, "of dropout and augmentation; -1: seed", -1, 2**32 - 1),
    "parallel": Field(
        "auto",
        'jit, pmap, mesh.data, mesh.zero, mesh.hybrid (docs/pods.md), or "auto": mesh.data with '
        "several devices, else jit",
        free=True,
    ),
    "hybrid_group": Field(
        8, "mesh.hybrid: devices that share the fc layers of one copy", 1, free=True
    ),
    "deterministic_gpu": Field(
        False,
        "GPU: use only operations that return the same bits every time, which can be slower. CPUs "
        "and TPUs do so anyway",
        free=True,
    ),
    "heartbeat_timeout_s": Field(
        100,
        "several processes: seconds without a sign of life after which one is lost",
        1,
        free=True,
    ),
    "dataset": Field("imagenet2012", 'a tfds name, or "folder:PATH" of class folders'),
    "data_dir": Field("~/tensorflow_datasets", "where tfds and the prepared stores are", free=True),
    "train_split": Field("train", "a split in the notation of tfds"),
    "eval_split": Field("validation", "a split in the notation of tfds"),
    "image_size": Field(
        256, "pixels of stored images: shorter side scaled to this, center square kept (§2)", 1
    ),
    "stored": Field(
        "square",
        '"whole": keep all of a training photograph, up to an aspect ratio of 2, for the inception '
        "crop",
    ),
    "preprocess": Field(
        "2012",
        "how files become squares of image_size: 2012, torchvision, caffe or brainscore "
        "(docs/studies.md)",
    ),
    "storage": Field(
        "raw", 'stored as pixels, or as "jpeg": a seventh of the disk space, slower to read'
    ),
    "shuffle_shards": Field(
        0,
        "0: an epoch is one permutation of all images. For buckets: the number of shards that are "
        "read at once, each whole, to mix their images (docs/data.md)",
        0,
    ),
    "max_corrupt": Field(0.001, "share of unreadable images that preparation may skip", 0, 1),
    "batch_size": Field(128, "global: over all devices and hosts (§5)", 1),
    "num_epochs": Field(90, "the paper trained for about 90 (§5)", 1),
    "learning_rate": Field(0.01, "at the start (§5)", 0),
    "label_smoothing": Field(
        0.0, "share of a label's probability that all classes share (arXiv 1512.00567, §7)", 0, 1
    ),
    "init_from": Field(
        "", "workdir of a trained or converted network to start from (docs/finetune.md)"
    ),
    "freeze": Field(
        (), 'layers that do not train, such as ("conv1", "conv2"); bn1 belongs to conv1'
    ),
    "model.variant": Field(
        "paper",
        "a key of alexnet_jax.VARIANTS, or cifar_80sec, cifar_18pct, cifar_13pct or cifar_11pct",
    ),
    "model.ablation": Field(
        (),
        "what the variant lacks: names of alexnet_jax.models.ablations.ABLATIONS, such as no_lrn, "
        "or no_LAYER, such as no_conv3 (docs/studies.md)",
    ),
    "model.num_classes": Field(1000, "number of logits", 1),
    "model.dtype": Field(
        "float32", 'of the arithmetic; "bfloat16" on accelerators. Parameters are float32'
    ),
    "model.dropout": Field(0.5, "probability that a hidden unit is dropped (§4.2)", 0, 1 - TINY),
    "model.init": Field("paper", '"paper": N(0, 0.01²) (§5); "he": scaled by fan-in'),
    "model.hidden_bias": Field(1.0, "initial bias of conv2, conv4, conv5, fc6 and fc7 (§5)"),
    "model.width": Field(1.0, "factor on the number of filters and hidden units", TINY),
    "model.conv1_padding": Field(
        -1, "zeros on each side of the image for conv1; -1: the variant's own, 2", -1
    ),
    "augment.crop": Field(
        "random", '"random": a window (§4.1); "inception": a random part, resized'
    ),
    "augment.crop_size": Field(224, "pixels that the network sees"),
    "augment.crop_area": Field((0.08, 1.0), "inception: share of the image's area (low, high)"),
    "augment.crop_aspect": Field((3 / 4, 4 / 3), "inception: width over height (low, high)"),
    "augment.flip": Field(True, "mirror half of the images (§4.1)"),
    "augment.trivial": Field(
        False, "one of 14 operations such as rotation for each image (TrivialAugment)"
    ),
    "augment.erase": Field(0.0, "probability that a rectangle is erased (random erasing)", 0, 1),
    "augment.mixup": Field(
        0.0, "α of the beta distribution of the shares of two averaged images; 0: no MixUp", 0
    ),
    "augment.cutmix": Field(
        0.0, "the same for images with a rectangle of another one; 0: no CutMix", 0
    ),
    "augment.mean": Field(
        "image", 'what is subtracted: "image" (§2), "image_center" (run #145) or "channel"'
    ),
    "augment.color_noise": Field(0.1, "standard deviation of the α of §4.1; 0: no noise", 0),
    "augment.color_noise_scale": Field(
        "eigenvalue", 'factor on the eigenvectors; or "std", its square root (run #145)'
    ),
    "augment.color_noise_shrink": Field(
        False, "divide the image by 1 + color_noise, as run #145 does"
    ),
    "augment.pixel_scale": Field(
        1.0, "factor on the mean-subtracted pixels, which run from 0 to 255 in the paper", TINY
    ),
    "augment.channel_scale": Field((1.0, 1.0, 1.0), "further factors on red, green and blue"),
    "optimizer.kind": Field(
        "sgd",
        'the paper\'s (§5); "sgdw", with decoupled weight decay; "lars" or "lamb", with a rate for '
        'every kernel, for large batches; "adamw"',
    ),
    "optimizer.trust_coefficient": Field(0.001, "lars: factor on ‖w‖ / ‖update‖", TINY),
    "optimizer.momentum": Field(0.9, "sgd, sgdw, lars: of the velocity (§5)", 0, 1),
    "optimizer.nesterov": Field(False, "sgd, sgdw, lars: Nesterov's momentum"),
    "optimizer.b1": Field(0.9, "adamw, lamb: decay of the mean of the gradient", 0, 1 - TINY),
    "optimizer.b2": Field(0.999, "adamw, lamb: decay of the mean of its square", 0, 1 - TINY),
    "optimizer.eps": Field(1e-8, "adamw, lamb: added to the root of that mean", 0),
    "optimizer.weight_decay": Field(0.0005, "of the kernels (§5)"),
    "optimizer.bias_weight_decay": Field(0.0, "of biases and batch norm"),
    "optimizer.bias_learning_rate": Field(1.0, "of biases, as a multiple of learning_rate"),
    "optimizer.layer_rates": Field((), 'factors on rates of layers, such as (("fc8", 10.0),)'),
    "optimizer.layer_decays": Field(
        (), 'weight_decay of layers with one of their own, such as (("fc8", 0.01),)'
    ),
    "optimizer.ema_decay": Field(
        0.0,
        "keep a moving average of the parameters and evaluate it too, such as 0.999; 0: none",
        0,
        1 - TINY,
    ),
    "optimizer.clip_norm": Field(
        0.0, "largest global norm of the gradients, logged as grad_norm; 0: no clipping", 0
    ),
    "optimizer.accumulate_steps": Field(
        1, "parts in which a batch's gradients are computed, to save memory", free=True
    ),
    "optimizer.gradient_dtype": Field(
        "float32",
        'in which several devices send and add up the kernels\' gradients; "bfloat16" halves the '
        "bytes and rounds each sum. No effect on CPU except with pmap",
    ),
    "schedule.kind": Field("constant", "constant, steps, plateau, cosine or polynomial"),
    "schedule.scaling": Field(
        "none", 'learning_rate grows with batch_size: "linear", or as its "sqrt"'
    ),
    "schedule.scaling_batch_size": Field(
        256, "linear and sqrt: the batch size at which learning_rate holds", 1
    ),
    "schedule.warmup_epochs": Field(0.0, "linear from 0, for any kind", 0),
    "schedule.step_epochs": Field((30.0, 60.0), "steps: epochs at which the rate drops"),
    "schedule.factor": Field(
        0.1, "steps and plateau: factor of a drop (§5: divided by 10)", TINY, 1 - TINY
    ),
    "schedule.patience": Field(5, "plateau: evaluations without a better top-1 before a drop", 1),
    "schedule.max_drops": Field(3, "plateau: number of drops (§5: three)", 0),
    "schedule.power": Field(2.0, "polynomial: the exponent"),
    "schedule.changes": Field(
        (), 'values from an epoch on: (epoch, layer or "all" or "data", field, value)'
    ),
    "eval.every_epochs": Field(1.0, "evaluate and save this often", TINY),
    "eval.crop_size": Field(0, "pixels that the network sees in evaluation; 0: as in training", 0),
    "eval.views": Field(
        "center",
        'or "ten": corners and center with their mirror images (§4.1), or "nine": three by three',
    ),
    "checkpoint.every_steps": Field(
        1000, "save this often, besides after evaluations", 1, free=True
    ),
    "checkpoint.keep": Field(
        3, "latest checkpoints to keep; the best by top-1 is kept too", 2, free=True
    ),
    "log_every_steps": Field(20, "steps averaged in a line of the log", 1, free=True),
}


def default_config() -> ConfigDict:
    """Returns every field with its default."""
    config = ConfigDict({"name": ""})  # `load` sets the name to the config file's
    for name, field in FIELDS.items():
        section, _, leaf = name.rpartition(".")
        if section and section not in config:
            config[section] = ConfigDict()
        (config[section] if section else config)[leaf] = field.default
    return config.lock()


def seed_for(config: ConfigDict, purpose: str) -> int:
    """Returns the seed for "weights", "order" or "dropout" (which includes augmentation)."""
    own: int = config.seeds[purpose]
    return config.seed if own < 0 else own


def load_config(path: str, **overrides: Any) -> ConfigDict:
    """Returns the config of a file with some values changed.

    Example:
      >>> load_config("quickstart", batch_size=32, **{"model.variant": "bn"})

    Args:
      path: as for `load`.
      overrides: values by the dotted names of fields.

    Raises:
      UserError: as `load`.
    """
    config = load(path)
    for name, value in overrides.items():
        _set(config, name, value, origin="load_config")
    return config


def load(path: str, overrides: Sequence[tuple[str, str]] = ()) -> ConfigDict:
    """Runs a config file's `get_config()` and applies overrides.

    Args:
      path: a Python file that defines `get_config() -> ConfigDict`, or the name of a bundled
        config. Where there is no file `configs/NAME.py`, the bundled one is used.
      overrides: pairs of a dotted field name and the text of its value.

    Raises:
      UserError: the file is missing, fails, has no get_config, or names an unknown field, or a
        value is not of its field's type.
    """
    file = _find(path)
    config = default_config()
    config.name = file.stem
    for name, value in flat(_get_config(file)).items():
        if name != "name":
            _set(config, name, value, origin=str(file))
    for name, text in overrides:
        _set(config, name, _parse_value(text, name, config), origin="the command line")
    return config


def bundled_configs() -> dict[str, Path]:
    """Returns the configs that come with the package, by name."""
    return {file.stem: file for file in sorted(BUNDLED_CONFIGS.glob("*.py"))}


def _find(path: str) -> Path:
    bundled = bundled_configs()
    file = Path(path)
    if file.is_file():
        return file
    if str(file) == file.stem or file.parts == ("configs", f"{file.stem}.py"):
        own = Path("configs") / f"{file.stem}.py"
        if own.is_file():
            return own
        if file.stem in bundled:
            return bundled[file.stem]
    known = sorted({*map(str, file.parent.glob("*.py")), *bundled})
    near = difflib.get_close_matches(str(file), known, n=3, cutoff=0.4)
    near += difflib.get_close_matches(file.stem, bundled, n=3, cutoff=0.4)
    choices = list(dict.fromkeys(near)) or known
    raise UserError(f"no config file {file}; the nearest are: {', '.join(choices)}")


def _get_config(file: Path) -> ConfigDict:
    try:
        get_config = runpy.run_path(str(file)).get("get_config")
        if get_config is None:
            raise UserError(f"{file} defines no get_config(); see configs/quickstart.py for one")
        config = get_config()
    except UserError:
        raise
    except Exception as error:
        lines = [
            f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(file)
        ]
        line = getattr(error, "lineno", None) or (lines[-1] if lines else 1)
        raise UserError(
            f"{file}, line {line}: {type(error).__name__}: {one_line(error)}"
        ) from error
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"{file}: get_config() must return a ConfigDict, not {type(config).__name__}"
        )
    return config


def check_bounds(config: ConfigDict) -> None:
    """Raises UserError if a number is outside its field's bounds."""
    for name, value in flat(config).items():
        field = FIELDS.get(name)
        bounded = field and (field.least, field.most) != (-INFINITY, INFINITY)
        if field and bounded and not field.least <= value <= field.most:
            raise UserError(f"{name}={value} must lie between {field.least:g} and {field.most:g}")


# ------------------------------------------------------------------------------------------
# The command line
# ------------------------------------------------------------------------------------------


def parse(
    argv: Sequence[str] | None, parser: argparse.ArgumentParser
) -> tuple[ConfigDict, argparse.Namespace]:
    """Parses `--config NAME`, `--config.FIELD=VALUE` and the parser's own arguments.

    `--help` lists the bundled configs. With `--config NAME` it lists the config's fields too.

    Returns:
      The config and the other arguments.

    Raises:
      UserError: as `load`, or an argument is unknown.
    """
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--config",
        required=True,
        metavar="NAME",
        help="a bundled config or a file; with --help: list its fields",
    )
    others, overrides = split_overrides(argv)
    if {"-h", "--help"} & {*others}:
        _print_help(parser, others, overrides)
    args, unknown = parser.parse_known_args(others)
    if unknown:
        raise UserError(f"unknown argument {unknown[0]}; --help lists the arguments")
    config = load(args.config, overrides)
    del args.config
    return config, args


def _print_help(
    parser: argparse.ArgumentParser, words: list[str], overrides: list[tuple[str, str]]
) -> NoReturn:
    named = argparse.ArgumentParser(add_help=False)
    named.add_argument("--config")
    path = named.parse_known_args(words)[0].config
    if path:
        config = load(path, overrides)
        lines = [f"fields of {path}, each set by --config.FIELD=VALUE:"]
        for name, value in flat(config).items():
            if name in FIELDS:
                lines += [f"  {name} = {value!r}", f"      {FIELDS[name].help}"]
    else:
        lines = ["bundled configs:"]
        for name, file in bundled_configs().items():
            summary = ast.get_docstring(ast.parse(file.read_text())) or ""
            lines.append(f"  {name:14} {summary.partition(chr(10))[0]}")
        lines += [
            "",
            "any field of a config: --config.FIELD=VALUE; --config NAME --help lists them",
        ]
    parser.epilog = "\n".join(lines)
    parser.print_help()
    sys.exit(0)


def split_overrides(argv: Sequence[str] | None) -> tuple[list[str], list[tuple[str, str]]]:
    """Returns the words of a command line without `--config.FIELD=VALUE`, and those, for `load`.

    argparse is not used because it treats a value with spaces as positional.
    """
    words, overrides = list(sys.argv[1:] if argv is None else argv), []
    others = []
    while words:
        word = words.pop(0)
        flag, has_value, value = word.partition("=")
        if not flag.startswith("--config."):
            others.append(word)
            continue
        if not has_value:
            if not words:
                raise UserError(f"{flag} needs a value: {flag}=VALUE")
            value = words.pop(0)
        overrides.append((flag.removeprefix("--config."), value))
    return others, overrides


# ------------------------------------------------------------------------------------------
# Saved configs
# ------------------------------------------------------------------------------------------


def folder_path(dataset: str) -> Path:
    """Returns the absolute path of a dataset "folder:PATH"."""
    return Path(dataset.removeprefix(FOLDER_PREFIX)).expanduser().resolve()


def to_json(config: ConfigDict) -> str:
    """Returns the config as indented JSON; tuples become lists, a folder's path absolute."""
    fields = config.to_dict()
    if fields["dataset"].startswith(FOLDER_PREFIX):
        fields["dataset"] = f"{FOLDER_PREFIX}{folder_path(fields['dataset'])}"
    return json.dumps(fields, indent=2, default=str)


def from_saved(saved: Any, origin: str) -> ConfigDict:
    """Returns the config that `to_json` wrote. Fields that are newer than it have their defaults.

    Args:
      saved: the content of the JSON file.
      origin: its name, for errors.

    Raises:
      UserError: it is no config, or names a field that does not exist.
    """
    if not isinstance(saved, dict):
        raise UserError(f"{origin} is damaged: it holds no config; put back a copy of it")
    config = default_config()
    fields = flat(ConfigDict(saved))
    for name, value in fields.items():
        _set(config, name, _with_tuples(value), origin)
    if "model.conv1_padding" not in fields:
        config.model.conv1_padding = _conv1_padding_in_0_1(flat(config))
    return config


def _conv1_padding_in_0_1(fields: dict[str, Any]) -> int:
    """Returns model.conv1_padding of a config of version 0.1, which had no such field.

    conv1 had no padding then wherever its windows fit the input evenly, as at 227 pixels.
    """
    size, variant = fields["augment.crop_size"], fields["model.variant"]
    fits = isinstance(size, int) and (size - 11) % 4 == 0
    return 0 if fits and variant not in ("original", "owt") else -1


def differing_fields(config: ConfigDict, saved: dict[str, Any]) -> list[str]:
    """Returns the fields, with both values, by which a saved config trains differently.

    Fields that are free to change and the name do not count, nor does the path of a folder of
    images (see `train.check_data_unchanged`). num_epochs may grow if the learning rate does not
    depend on it. A field that is newer than the saved config has its default there.
    """
    now = flat(ConfigDict(json.loads(to_json(config))))
    defaults = json.loads(to_json(default_config()))
    there = flat(ConfigDict(saved))
    before = flat(ConfigDict(defaults)) | there
    if "model.conv1_padding" not in there:
        before["model.conv1_padding"] = _conv1_padding_in_0_1(before)
    if all(str(fields["dataset"]).startswith(FOLDER_PREFIX) for fields in (now, before)):
        before["dataset"] = now["dataset"]
    free = {"name", *(name for name, field in FIELDS.items() if field.free)}
    if now["num_epochs"] >= before["num_epochs"] and now["schedule.kind"] in OPEN_ENDED_SCHEDULES:
        free.add("num_epochs")
    return [
        f"{name} ({before.get(name, 'absent')} there, {now.get(name, 'absent')} here)"
        for name in sorted(now.keys() | before.keys())
        if before.get(name) != now.get(name) and name not in free
    ]


def _with_tuples(value: Any) -> Any:
    return tuple(map(_with_tuples, value)) if isinstance(value, list | tuple) else value


# ------------------------------------------------------------------------------------------
# Fields
# ------------------------------------------------------------------------------------------


def flat(config: ConfigDict) -> dict[str, Any]:
    """Returns every field's value by its dotted name."""
    return dict(_walk(config))


def _walk(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            yield from _walk(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _set(config: ConfigDict, name: str, value: Any, origin: str) -> None:
    known = flat(config)
    if name not in known:
        tails = {n.split(".")[-1]: n for n in known}
        near = difflib.get_close_matches(name, known, n=3)
        near += [tails[t] for t in difflib.get_close_matches(name.split(".")[-1], tails, n=3)]
        near = list(dict.fromkeys(near)) or list(known)
        raise UserError(f"{origin}: unknown field {name}; the nearest are {', '.join(near[:4])}")
    kind = type(known[name])
    if kind is float and type(value) is int:
        value = float(value)
    if isinstance(value, list):
        value = tuple(value)
    if type(value) is not kind:
        example = {bool: "true or false", tuple: "(30, 60)", str: "a name"}.get(kind, known[name])
        raise UserError(
            f"{origin}: {name}={value!r} must be of type {kind.__name__}, like {example}"
        )
    parent, _, leaf = name.rpartition(".")
    (config[parent] if parent else config)[leaf] = value


def _parse_value(text: str, name: str, config: ConfigDict) -> Any:
    kind: Any = type(flat(config).get(name))
    if name not in flat(config) or kind is str:
        return text
    if kind is bool:
        return {"true": True, "false": False, "1": True, "0": False}.get(text.lower(), text)
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        names = tuple(part.strip() for part in text.split(","))
        return names if kind is tuple and all(map(str.isidentifier, names)) else text
