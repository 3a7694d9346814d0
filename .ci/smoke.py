"""Tries the installed package, without its extras, as a user would: every command's help; a folder
of images, training, a prediction and an export.

cd "$(mktemp -d)" && PYTHON -P CHECKOUT/.ci/smoke.py      (-P: imports nothing from beside it)
"""

import contextlib
import io
import json
import os
import runpy
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
from PIL import Image

import alexnet_jax

SMALL_RUN = (
    *("--config", "quickstart", "--config.dataset=folder:images", "--config.data_dir=data"),
    *("--config.train_split=train", "--config.eval_split=val", "--config.model.num_classes=2"),
    *("--config.num_epochs=2", "--config.batch_size=8"),
    *("--config.model.variant=bn", "--config.model.width=0.1"),
)  # 4 steps
BIN = Path(sys.executable).parent


def help_of(command: str) -> str:
    """Runs the script that pip made, in this process, since each would import JAX for seconds."""
    sys.argv = [command, "--help"]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        try:
            runpy.run_path(str(BIN / command), run_name="__main__")
        except SystemExit as leaving:
            assert not leaving.code, f"{command} --help left with {leaving.code}"
    return printed.getvalue()


def write_images() -> None:
    """Writes images of two classes: dark and bright noise."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        for level, name in ((0, "dark"), (128, "bright")):
            folder = Path("images", split, name)
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(level, level + 128, (80, 96, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.jpg")


def run(command: str, *arguments: str) -> str:
    """Returns what a command prints on stdout."""
    fast_to_compile = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=1"}
    done = subprocess.run(
        [BIN / command, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | fast_to_compile,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def main() -> None:
    """Exits with a traceback where anything is not as it should be."""
    assert Path(alexnet_jax.__file__).is_relative_to(sys.prefix), alexnet_jax.__file__
    commands = [e.name for e in distribution("alexnet-jax").entry_points]
    for command in commands:
        assert "usage: " in help_of(command), command
    write_images()
    assert "finished at step 4" in run("alexnet-train", *SMALL_RUN)
    output = run("alexnet-predict", "--json", "runs/quickstart", "images/val/dark/0.jpg")
    first = json.loads(output)["predictions"][0]
    assert first["class"] in ("dark", "bright"), output
    assert "wrote net.jaxexport" in run("alexnet-export", "runs/quickstart", "net.jaxexport")
    print(f"{len(commands)} commands help, training and export end, a prediction: {first}")


if __name__ == "__main__":
    main()
