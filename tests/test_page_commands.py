"""Programs accept the arguments that the README, CONTRIBUTING.md and docs/ give them.

Each program stops when it has parsed its arguments and loaded its config. A `long` test runs those
that need only a trained network.
"""

import argparse
import functools
import glob
import importlib
import itertools
import json
import os
import re
import shlex
import shutil
import sys
import tomllib

import commands
import images
import pytest
from PIL import Image
from test_research_page import workdirs  # noqa: F401

from alexnet_jax import build_model
from alexnet_jax import config as configs
from alexnet_jax.utils import process

ROOT = commands.ROOT
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SCRIPTS = PROJECT["project"]["scripts"]
MARKERS = {text.partition(":")[0] for text in PROJECT["tool"]["pytest"]["ini_options"]["markers"]}
NOT_PARSED = {"ruff", "mypy", "mkdocs", "uv", "cd", "printf", "nohup", "source"}
NOT_PARSED |= {".ci/run", "git", "twine"}  # of a release
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.S | re.M)
# Words of sentences that stand for others.
PLACEHOLDER = re.compile(r"WHAT|PICTURE|.*(…|\.\.\.)")
# Commands that are executed, unless they need a package, minutes or a process of their own.
EXECUTED = ("evaluate", "predict", "features", "lpips", "similarity", "visualize", "export")
MORE_NEEDED = {"digits.onnx", "maximize", "data"}
NETWORKS = (
    *("imagenette", "imagenette_transfer", "torchvision", "bn", "owt", "paper"),
    *(f"seed{seed}" for seed in range(5)),
    *("population/seed0", "population/seed1"),
)
COLLECT = """
import json, os, sys, pytest
codes = []
printed, sys.stdout = sys.stdout, open(os.devnull, "w")
for words in json.loads(sys.argv[1]):
    codes.append(pytest.main(["--collect-only", "--quiet", *words]))
json.dump(codes, printed)
"""


def split(line):
    """Returns the commands in a line of a shell, each as its words without variables before it."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    found = [[]]
    for word in lexer:
        if word in ("&&", "&", ";"):
            found.append([])
        elif found[-1] or not re.match(r"\w+=", word):
            found[-1].append(word)
    return [words for words in found if words]


def block_commands(page):
    blocks = [b for kind, b in FENCE.findall(page.read_text()) if kind in ("bash", "console", "sh")]
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [words for line in lines for words in split(line)]


def inline_code(page):
    """Returns the code in sentences and tables."""
    text = FENCE.sub("", page.read_text())
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text)]


class Parsed(BaseException):
    """Ends a program whose arguments are valid."""


@pytest.fixture
def check(monkeypatch, capsys):
    """Returns a function that asserts that a command's program accepts the arguments."""
    parse_args, load = argparse.ArgumentParser.parse_args, configs.load

    def parse_then_stop(parser, *args):
        found = parse_args(parser, *args)
        if getattr(found, "config", None) is None:
            raise Parsed
        return found  # `load` stops it

    def load_then_stop(path, overrides=()):
        config = load(path, overrides)
        configs.check_bounds(config)
        build_model(config)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_then_stop)
    monkeypatch.setattr(configs, "load", load_then_stop)
    monkeypatch.setattr(process, "set_up", lambda *_: None)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # commands replace it
    monkeypatch.setattr(os, "environ", os.environ.copy())  # benchmarks change it when imported
    for folder in ("benchmarks", ""):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    monkeypatch.chdir(ROOT)

    def check(words, complete=True):
        # Following the recipe makes the former.
        words = [word.replace("configs/digits_bn.py", "configs/quickstart.py") for word in words]
        program, *arguments = words
        program = program.removeprefix(".venv/bin/")
        if program in SCRIPTS:
            target = SCRIPTS[program].removesuffix(":main")
            check_main(target.replace(".", "/") + ".py", arguments, complete)
        elif program in ("python", "python3"):
            target, *arguments = arguments
            if target == "-m":
                target, *arguments = arguments
                target = target.replace(".", "/") + ".py"
            if target not in ("venv.py", "alexnet_jax.py", "build.py"):
                check_main(target, arguments, complete)
        elif program == "pip":
            check_pip(*arguments)
        elif program == "srun":
            check(arguments[arguments.index("python") :])
        elif program == "gcloud":
            (remote,) = (word for word in arguments if word.startswith("--command="))
            for inner in split(remote.removeprefix("--command=")):
                check(inner)
        else:
            assert program in NOT_PARSED, words

    def check_main(path, arguments, complete):
        """Calls a module's `main`. If not `complete`, it may only say what else is required."""
        assert (ROOT / path).is_file(), path
        folder, _, name = path.removesuffix(".py").rpartition("/")
        if name == "execute_tutorial":
            assert not arguments
            return
        if name == "torch_twin":
            pytest.importorskip("torch")
        module = importlib.import_module(f"alexnet_jax.{name}" if folder == "alexnet_jax" else name)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [name, *arguments])
            try:
                module.main()
            except Parsed:
                pass
            except SystemExit:
                message = capsys.readouterr().err
                assert "are required" in message and not complete, (arguments, message)
        if name == "launch":
            check(["python", *arguments[arguments.index("--") + 1 :]])
        if name == "sweep":
            pairs = list(itertools.pairwise(arguments))
            common = [word for word in arguments if word.startswith("--config.")]
            common += [word for pair in pairs if pair[0] == "--config" for word in pair]
            for option, value in pairs:
                if option == "--with":
                    fields = [f"--config.{field}" for field in shlex.split(value)]
                    check_main("train.py", [*common, *fields], True)

    return check


@functools.cache
def check_pip(*arguments):
    pytest.importorskip("pip")
    # pip stops at the first wrong option, or at --help.
    result = commands.run(sys.executable, "-m", "pip", *arguments, "--help")
    assert result.returncode == 0, result.stderr
    for option, word in itertools.pairwise(["", *arguments]):
        if option == "-r":
            assert (ROOT / word).is_file(), word
        elif word.startswith(".["):
            assert {*word[2:-1].split(",")} <= {*PROJECT["project"]["optional-dependencies"]}, word


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_programs_accept_the_commands_in_blocks(page, check):
    for words in block_commands(page):
        if "pytest" not in words:
            check(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_programs_accept_the_commands_and_fields_in_sentences(page, check):
    fields = configs.flat(configs.default_config())
    sections = {name.partition(".")[0] for name in fields if "." in name}
    for code in inline_code(page):
        if re.match(r"(python3?|pip|alexnet-\w+) |\w+\.py -?\w", code) and "pytest" not in code:
            (words,) = split(code.replace("configs/NAME.py", "configs/imagenet.py"))
            words = [word for word in words if not PLACEHOLDER.fullmatch(word)]
            benchmark = f"benchmarks/{words[0]}"
            if words[0].endswith(".py"):
                words = ["python", benchmark, *words[1:]]
            if words[1:]:
                check(words, complete=False)
        elif code.startswith(("-r ", "--no-deps -r ")):
            check_pip("install", *code.split())
        elif code.startswith("--config."):
            for field, _, value in (word[9:].partition("=") for word in code.split()):
                known = fields[field] if value in ("", "NAME") else value
                check(["python", "train.py", "--config=imagenet", f"--config.{field}={known}"])
        elif re.fullmatch(r"[a-z_.]+=\w+", code):
            check(["python", "train.py", "--config=imagenet", f"--config.{code}"])
        elif re.fullmatch(r"[a-z]+\.[a-z_]+", code) and code.partition(".")[0] in sections:
            assert code in fields


def test_options_in_sentences_exist(check, capsys):
    for target in SCRIPTS.values():
        with pytest.raises(SystemExit):
            importlib.import_module(target.removesuffix(":main")).main(["--help"])
    texts = (
        capsys.readouterr().out + importlib.import_module("harness").parser("", "").format_help()
    )
    code = [code for page in PAGES for code in inline_code(page)]
    named = {c.split()[0] for c in code if c.startswith("--") and not c.startswith("--config.")}
    assert named <= {*re.findall(r"--[\w-]+", texts), "--no-deps"}  # the last is pip's
    assert {c.removeprefix("-m ") for c in code if c.startswith("-m ")} <= MARKERS


@pytest.mark.long
def test_pytest_finds_the_tests_that_pages_name():
    found = [(page.name, words) for page in PAGES for words in block_commands(page)]
    found += [
        (page.name, words)
        for page in PAGES
        for code in inline_code(page)
        if code.startswith("pytest ")
        for words in split(code)
    ]
    calls = [
        (page, words[words.index("pytest") + 1 :]) for page, words in found if "pytest" in words
    ]
    # Of the whole suite only the options are parsed.
    files = [[] if "tests/" in " ".join(words) else ["tests/test_layers.py"] for _, words in calls]
    arguments = [[*words, *file] for (_, words), file in zip(calls, files, strict=True)]
    result = commands.run(sys.executable, "-c", COLLECT, json.dumps(arguments))
    for (page, words), file, code in zip(calls, files, json.loads(result.stdout), strict=True):
        # The recipes of CONTRIBUTING.md make some of its tests; test_contributing follows them.
        may_be_missing = file or page == "CONTRIBUTING.md"
        assert code == pytest.ExitCode.OK or (
            may_be_missing and code == pytest.ExitCode.NO_TESTS_COLLECTED
        ), (page, words, result.stderr)


@pytest.mark.long
@pytest.mark.usefixtures("workdirs")
def test_commands_for_a_trained_network_run(trained_run, digits, tmp_path, monkeypatch, capsys):
    """The networks are small ones, and all photographs the same."""
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # commands replace it
    for name in NETWORKS:
        shutil.copytree(trained_run, tmp_path / "runs" / name)
    (tmp_path / "data").symlink_to(digits)
    (tmp_path / "photos").mkdir()
    for words in itertools.chain(*map(block_commands, PAGES[2:])):
        command, *arguments = words[2:] if words[:2] == ["python", "-m"] else words
        name = re.sub("alexnet(_jax.|-)", "", command)
        if name not in EXECUTED or MORE_NEEDED & {*arguments}:
            continue
        for picture in ["photos/a.jpg", *arguments]:
            if picture.endswith((".jpg", ".png")):
                Image.fromarray(images.photograph(0)).save(tmp_path / picture)
        files = [sorted(glob.glob(word)) if "*" in word else [word] for word in arguments]
        with pytest.raises(SystemExit) as ended:
            importlib.import_module(f"alexnet_jax.{name}").main([*itertools.chain(*files)])
        assert not ended.value.code, (words, capsys.readouterr().err)
