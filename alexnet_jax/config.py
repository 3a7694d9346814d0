"""Configs: the fields every run has, and how a command line names and changes them.

A config is a Python file with `get_config()`, which takes `default_config()` and changes what
differs. Fork one freely; a field that does not exist is an error, never silently ignored.
"""

import argparse
import ast
import difflib
import json
import runpy
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from alexnet_jax.utils.errors import UserError, one_line

# A run may go on with other values of these, since they change no parameter of the network.
FIELDS_FREE_TO_CHANGE = ("data_dir", "log_every_steps", "checkpoint.keep", "checkpoint.every_steps")

_INSTALLED = Path(__file__).with_name("configs")
OUR_CONFIGS = _INSTALLED if _INSTALLED.is_dir() else Path(__file__).parents[1] / "configs"

OVERRIDES_HELP = "Any field of the config: --config.FIELD=VALUE, e.g. --config.batch_size=64"

INFINITY = float("inf")
TINY = 1e-6
BOUNDS = {
    "seed": (0, 2**32 - 1),
    "batch_size": (1, INFINITY),
    "num_epochs": (1, INFINITY),
    "learning_rate": (0, INFINITY),
    "log_every_steps": (1, INFINITY),
    "max_corrupt": (0, 1),
    "hybrid_group": (1, INFINITY),
    "model.num_classes": (1, INFINITY),
    "model.width": (TINY, INFINITY),
    "model.dropout": (0, 1 - TINY),
    "image_size": (1, INFINITY),
    "augment.color_noise": (0, INFINITY),
    "augment.pixel_scale": (TINY, INFINITY),
    "optimizer.trust_coefficient": (TINY, INFINITY),
    "optimizer.momentum": (0, 1),
    "optimizer.clip_norm": (0, INFINITY),
    "schedule.scaling_batch_size": (1, INFINITY),
    "schedule.warmup_epochs": (0, INFINITY),
    "schedule.factor": (TINY, 1 - TINY),
    "schedule.patience": (1, INFINITY),
    "schedule.max_drops": (0, INFINITY),
    "eval.every_epochs": (TINY, INFINITY),
    "checkpoint.every_steps": (1, INFINITY),
    "checkpoint.keep": (2, INFINITY),  # one to fall back to
}


def default_config() -> ConfigDict:
    """Returns every field there is, with the values of the 2012 paper where it gives one."""
    c = ConfigDict()
    c.name = ""  # set by `load` to the config file's name
    c.seed = 0
    # "jit", "pmap", "mesh.data", "mesh.zero", "mesh.hybrid" (docs/pods.md), or "auto": mesh.data
    # where there are several devices.
    c.parallel = "auto"
    c.hybrid_group = 8  # mesh.hybrid: devices that share the fc layers of one copy

    c.dataset = "imagenet2012"  # a tfds name, or "folder:PATH" of class folders
    c.data_dir = "~/tensorflow_datasets"  # where tfds and the prepared stores lie
    c.train_split = "train"
    c.eval_split = "validation"
    c.image_size = 256  # stored images: shorter side scaled to this, centre square kept
    c.storage = "raw"  # stored as pixels, or as "jpeg": a seventh of the disk, slower to read
    c.max_corrupt = 0.001  # share of unreadable images that preparation may skip

    c.batch_size = 128  # global: over all devices and hosts
    c.num_epochs = 90
    c.learning_rate = 0.01

    # A workdir, of train.py or of a converted network, whose weights and mean a run starts from;
    # fc8 is made anew where the classes are others (docs/finetune.md).
    c.init_from = ""
    c.freeze = ()  # layers that stay as they are, e.g. ("conv1", "conv2"); bn1 goes with conv1

    c.model = _model()
    c.augment = _augment()
    c.optimizer = _optimizer()
    c.schedule = _schedule()

    c.eval = ConfigDict()
    c.eval.every_epochs = 1.0
    c.eval.views = "center"  # or "ten": corners and centre with their flips, averaged

    c.checkpoint = ConfigDict()
    c.checkpoint.every_steps = 1000  # besides one after every evaluation
    c.checkpoint.keep = 3  # latest ones; the best by top-1 is always kept too

    c.log_every_steps = 20
    return c.lock()


def _model() -> ConfigDict:
    c = ConfigDict()
    c.variant = "paper"  # a key of model.VARIANTS
    c.num_classes = 1000
    c.dtype = "float32"  # of the arithmetic; "bfloat16" on accelerators. params: float32
    c.dropout = 0.5
    c.init = "paper"  # "paper": N(0, 0.01^2); "he": scaled to each layer's fan-in
    c.hidden_bias = 1.0  # initial bias of conv2, conv4, conv5, fc6 and fc7
    c.width = 1.0  # multiplies the number of filters and hidden units
    return c


def _augment() -> ConfigDict:
    c = ConfigDict()
    c.crop = "random"  # the paper's window; "inception": a random part, resized
    c.crop_size = 224
    c.crop_area = (0.08, 1.0)  # inception: the part's share of the image's area ...
    c.crop_aspect = (3 / 4, 4 / 3)  # inception: ... and its width over its height
    c.flip = True
    c.mean = "image"  # subtracted: "image", "image_center" (run #145) or "channel"
    c.color_noise = 0.1  # standard deviation of the paper's alpha; 0: none
    c.color_noise_scale = "eigenvalue"  # or "std": its square root (run #145)
    c.color_noise_shrink = False  # divide the image by 1 + color_noise (run #145)
    c.pixel_scale = 1.0  # multiplies the mean-subtracted pixels (0 to 255 in the paper)
    c.channel_scale = (1.0, 1.0, 1.0)  # multiplies red, green and blue besides
    return c


def _optimizer() -> ConfigDict:
    c = ConfigDict()
    c.kind = "sgd"  # or "lars": a rate for every weight array, for large batches
    c.trust_coefficient = 0.001  # lars: multiplies the weights' norm over the step's
    c.momentum = 0.9
    c.weight_decay = 0.0005  # of the weights
    c.bias_weight_decay = 0.0
    c.bias_learning_rate = 1.0  # biases' rate as a multiple of learning_rate
    c.layer_rates = ()  # multiples of a layer's rates, e.g. (("fc8", 10.0),)
    # Largest global norm of the gradients, shown as grad_norm; 0: no clipping, nor grad_norm.
    c.clip_norm = 0.0
    c.accumulate_steps = 1  # a batch's gradients in so many parts, to save memory
    c.gradient_dtype = "float32"  # of gradients on their way between devices; "bfloat16"
    return c


def _schedule() -> ConfigDict:
    c = ConfigDict()
    c.kind = "constant"  # "constant", "steps", "plateau", "cosine", "polynomial"
    c.scaling = "none"  # learning_rate grows with batch_size: "linear", or as its "sqrt"
    c.scaling_batch_size = 256  # linear and sqrt: where learning_rate is as it stands
    c.warmup_epochs = 0.0  # linear from 0, under any kind
    c.step_epochs = (30.0, 60.0)  # steps: epochs at which the rate is multiplied ...
    c.factor = 0.1  # steps and plateau: ... by this
    c.patience = 5  # plateau: evaluations without a better top-1 before a drop
    c.max_drops = 3  # plateau
    c.power = 2.0  # polynomial
    # Absolute values from an epoch on, as a log: (epoch, layer or "all" or "data", field, value).
    c.changes = ()
    return c


def load(path: str, overrides: Sequence[tuple[str, str]] = ()) -> ConfigDict:
    """Runs a config file's `get_config()` and applies overrides.

    Args:
      path: a Python file that defines `get_config() -> ConfigDict`. Where there is no such
        `configs/NAME.py` it is the one that came with the package.
      overrides: pairs of a dotted field name and the text of its value.

    Raises:
      UserError: the file is missing, fails, has no get_config, or names an unknown field; a
        value is not of its field's kind.
    """
    file = _found(Path(path))
    config = default_config()
    config.name = file.stem
    for name, value in flat(_get_config(file)).items():
        if name != "name":
            _set(config, name, value, origin=str(file))
    for name, text in overrides:
        _set(config, name, text, origin="the command line", parse=True)
    return config


def _found(file: Path) -> Path:
    ours = {f"configs/{path.name}": path for path in OUR_CONFIGS.glob("*.py")}
    if file.is_file():
        return file
    if str(file) in ours:
        return ours[str(file)]
    known = sorted({*map(str, file.parent.glob("*.py")), *ours})
    near = difflib.get_close_matches(str(file), known, n=3, cutoff=0.4) or known
    raise UserError(f"no config file {file}; there are: {', '.join(near)}")


def from_saved(saved: Any, origin: str) -> ConfigDict:
    """Returns the config that `to_json` wrote; fields that are newer than it have their defaults.

    Args:
      saved: the JSON's content.
      origin: its file, for errors.

    Raises UserError if it is no config, or names a field that does not exist.
    """
    if not isinstance(saved, dict):
        raise UserError(f"{origin} is damaged: it holds no config; put back a copy of it")
    config = default_config()
    for name, value in flat(ConfigDict(saved)).items():
        _set(config, name, _with_tuples(value), origin)
    return config


def _with_tuples(value: Any) -> Any:
    return tuple(map(_with_tuples, value)) if isinstance(value, list | tuple) else value


def check_bounds(config: ConfigDict) -> None:
    """Raises UserError if a number lies outside of what makes sense for its field."""
    fields = flat(config)
    for name, (least, most) in BOUNDS.items():
        if not least <= fields[name] <= most:
            raise UserError(f"{name}={fields[name]} must lie between {least:g} and {most:g}")


def parse(
    argv: Sequence[str] | None, parser: argparse.ArgumentParser
) -> tuple[ConfigDict, argparse.Namespace]:
    """Parses `--config FILE`, `--config.FIELD=VALUE` and the parser's own arguments.

    Returns the config and the other arguments. Raises as `load` does, and UserError for an
    argument that is not known.
    """
    parser.add_argument("--config", required=True, metavar="FILE", help="e.g. configs/imagenet.py")
    parser.epilog = OVERRIDES_HELP
    others, overrides = split_overrides(argv)
    args, unknown = parser.parse_known_args(others)
    if unknown:
        raise UserError(f"unknown argument {unknown[0]}; --help shows those there are")
    config = load(args.config, overrides)
    del args.config
    return config, args


def split_overrides(argv: Sequence[str] | None) -> tuple[list[str], list[tuple[str, str]]]:
    """Returns the words of a command line that are no `--config.FIELD=VALUE`, and those that are.

    The latter as `load` takes them. Not argparse does it, which takes a value with a space in it
    for a positional argument.
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


def to_json(config: ConfigDict) -> str:
    """Returns the config as indented JSON; tuples become lists."""
    return json.dumps(config.to_dict(), indent=2, default=str)


def differing_fields(config: ConfigDict, saved: dict[str, Any]) -> list[str]:
    """Names the fields, with both values, in which a saved config and this one train otherwise.

    Fields in FIELDS_FREE_TO_CHANGE, and the name, do not count. A field that came into the program
    after the config was saved has its default there, by which nothing changes.
    """
    now = flat(ConfigDict(json.loads(to_json(config))))
    defaults = json.loads(to_json(default_config()))
    before = flat(ConfigDict(defaults)) | flat(ConfigDict(saved))
    return [
        f"{name} ({before.get(name, 'absent')} there, {now.get(name, 'absent')} here)"
        for name in sorted(now.keys() | before.keys())
        if before.get(name) != now.get(name) and name not in ("name", *FIELDS_FREE_TO_CHANGE)
    ]


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


def flat(config: ConfigDict) -> dict[str, Any]:
    """Returns every field's value by its dotted name."""
    return dict(_fields(config))


def _fields(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            yield from _fields(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _set(config: ConfigDict, name: str, value: Any, origin: str, parse: bool = False) -> None:
    known = flat(config)
    if name not in known:
        tails = {n.split(".")[-1]: n for n in known}
        near = difflib.get_close_matches(name, known, n=3)
        near += [tails[t] for t in difflib.get_close_matches(name.split(".")[-1], tails, n=3)]
        near = list(dict.fromkeys(near)) or list(known)
        raise UserError(f"{origin}: unknown field {name}; the nearest are {', '.join(near[:4])}")
    kind = type(known[name])
    if parse:
        value = _parse_value(value, kind)
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


def _parse_value(text: str, kind: type) -> Any:
    if kind is str:
        return text
    if kind is bool:
        return {"true": True, "false": False, "1": True, "0": False}.get(text.lower(), text)
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        names = tuple(name.strip() for name in text.split(","))
        return names if kind is tuple and all(map(str.isidentifier, names)) else text
