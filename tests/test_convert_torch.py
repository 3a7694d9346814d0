"""torchvision's alexnet becomes a workdir and comes back: the same bits, the same logits."""

import sys

import commands
import foreign
import numpy as np
import pytest
import safetensors.numpy

MODULES = ["features.0", "features.3", "features.6", "features.8", "features.10"]
MODULES += ["classifier.1", "classifier.4", "classifier.6"]


@pytest.fixture(scope="module")
def state_dict() -> dict[str, np.ndarray]:
    weights = foreign.random_weights("owt", bias=0.3)
    return {
        f"{module}.{part}": array
        for module, pair in zip(MODULES, weights.values(), strict=True)
        for part, array in zip(("weight", "bias"), pair, strict=True)
    }


@pytest.fixture(scope="module")
def workdir(state_dict, tmp_path_factory):
    """The state_dict, converted by the command line."""
    folder = tmp_path_factory.mktemp("torchvision")
    safetensors.numpy.save_file(state_dict, folder / "alexnet.safetensors")
    (folder / "names.txt").write_text("".join(f"name {n}\n" for n in range(foreign.CLASSES)))
    result = commands.run(
        *(sys.executable, "-m", "alexnet_jax.convert", folder / "alexnet.safetensors"),
        *(folder / "run", "--class-names", folder / "names.txt"),
    )
    assert result.returncode == 0, result.stderr
    assert "holds variant owt, 7 classes, for crops of 224" in result.stdout
    return folder / "run"
