"""`python -m alexnet_jax` and the help of every command."""

import importlib
import sys
import tomllib

import commands
import pytest

SCRIPTS = tomllib.loads((commands.ROOT / "pyproject.toml").read_text())["project"]["scripts"]
COMMANDS = [target.removesuffix(":main") for target in SCRIPTS.values()]


def test_list_has_each_command_with_its_summary():
    result = commands.run(sys.executable, "-m", "alexnet_jax")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.partition("commands:\n")[2].splitlines()
    summaries = dict(line.split(maxsplit=1) for line in lines)
    assert sorted(f"alexnet_jax.{name}" for name in summaries) == sorted(COMMANDS)


@pytest.mark.parametrize("argument, name", [("train", "train"), ("trian", "COMMAND")])
def test_arguments_are_rejected(argument, name):
    result = commands.run(sys.executable, "-m", "alexnet_jax", argument)
    assert result.returncode == 2 and result.stdout == ""
    assert (
        result.stderr == f"error: unknown argument {argument}; run python -m alexnet_jax.{name}\n"
    )


@pytest.mark.parametrize("module", COMMANDS)
def test_every_command_has_help(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # commands replace it
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(module).main()
    assert not ended.value.code
    printed = capsys.readouterr()
    assert printed.out.startswith(("usage:", "Usage:")) and printed.err == ""
