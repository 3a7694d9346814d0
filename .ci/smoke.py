"""Tries the installed package as a user would, in an empty folder: help, training, prediction.

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

import alexnet_jax

FEW_DIGITS = (
    *("--config", "configs/quickstart.py", "--config.data_dir=data", "--config.num_epochs=1"),
    *("--config.train_split=train[:480]", "--config.eval_split=test[:480]"),
    *("--config.batch_size=24", "--config.model.variant=bn", "--config.model.width=0.1"),
)  # 20 steps
BIN = Path(sys.executable).parent


def help_of(command: str) -> str:
    """Runs the script that pip made, in this process, since each would import JAX for seconds."""
    sys.argv = [command, "--help"]
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        try:
            runpy.run_path(str(BIN / command), run_name="__main__")
        except SystemExit as leaving:
            assert not leaving.code, f"{command} --help left with {leaving.code}"
    return told.getvalue()


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
    assert "finished at step 20" in run("alexnet-train", *FEW_DIGITS)
    told = run("alexnet-predict", "--json", "runs/quickstart", "runs/quickstart/samples.png")
    first = json.loads(told)["predictions"][0]
    assert first["class"] in "0123456789", told
    print(f"{len(commands)} commands help, training ends, a prediction: {first}")


if __name__ == "__main__":
    main()
