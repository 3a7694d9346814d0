"""How the code is laid out: who may import whom, and how long files and functions may be."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "alexnet_jax"
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")
CODE = sorted(
    path.relative_to(ROOT)
    for part in ("alexnet_jax", "configs", "tests", "benchmarks", "docs")
    for path in (ROOT / part).rglob("*.py")
)

# From the ground up: a module imports modules of lower levels only, also inside of functions.
LEVELS = (
    "errors buffers runtime shuffle whole_files plots pixel_statistics onnx_graph winograd",
    "config hosts interrupt decode shards plain_pickle tpu layers",
    "model launch zarr_files",
    "layouts optim network_picture store_files",
    "augment pipeline sources caffe_weights torch_weights weights_2012",
    "step prepare",
    "placement checkpoint report samples store",
    "parallel",
    "trained checks slice_costs",
    "finetune evaluate predict convert export feature_maps neighbors occlusion plan",
    "train answer visualize",
    "serve",
)
LEVEL = {module: level for level, names in enumerate(LEVELS) for module in names.split()}
DATA = {"store_files", "store", "prepare", "sources", "pipeline", "decode", "shards", "zarr_files"}


def imported(module):
    """The modules of the package that one of them imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "alexnet_jax":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("alexnet_jax."):
            found.add(node.module.split(".")[1])
    return found & set(MODULES)


def imported_in_all(module):
    """Those, and what they import."""
    found = imported(module)
    return found.union(*map(imported_in_all, found))


def test_every_module_has_its_level():
    assert sorted(LEVEL) == MODULES


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_lower_levels_only(module):
    assert not {other for other in imported(module) if LEVEL[other] >= LEVEL[module]}


def test_the_design_s_chain_rises():
    chain = ("layers", "model", "step", "parallel", "train")
    assert list(map(LEVEL.get, chain)) == sorted({LEVEL[module] for module in chain})
    for lower, upper in zip(chain, chain[1:], strict=False):
        assert lower in imported(upper)


def test_the_model_knows_nothing_of_data():
    assert not imported_in_all("model") & DATA


def test_nothing_imports_training():
    assert not [module for module in MODULES if "train" in imported(module)]


@pytest.mark.parametrize("path", CODE, ids=str)
def test_files_and_functions_are_short(path):
    text = (ROOT / path).read_text()
    assert len(text.splitlines()) <= 400
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    lengths = {
        node.name: node.end_lineno - node.lineno + 1
        for node in ast.walk(ast.parse(text))
        if isinstance(node, functions)
    }
    assert not {name: length for name, length in lengths.items() if length > 60}
