"""Saliency, Grad-CAM and activation maximization against direct computations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from images import encode, photograph
from narrow_model import NARROW, images, random_variables
from PIL import Image

from alexnet_jax import config as configs
from alexnet_jax import inference, visualize
from alexnet_jax.analysis import attribution
from alexnet_jax.analysis.attribution import Ascent, grad_cam, last_maps, maximize, saliency
from alexnet_jax.data.augment import Statistics
from alexnet_jax.models.alexnet import VARIANTS, AlexNet
from alexnet_jax.utils.errors import UserError

MODEL = AlexNet("owt", num_classes=5, width=NARROW)
LABELS = jnp.array([3, 1])


@pytest.fixture(scope="module")
def x():
    return images(95)


@pytest.fixture(scope="module")
def variables(x):
    return random_variables(MODEL, x)


@pytest.fixture(scope="module")
def network():
    """An untrained narrow network that sees 64 of 72 pixels."""
    fields = {"model.variant": "single", "model.width": "0.1"}
    config = configs.load("configs/quickstart.py", fields.items())
    model = AlexNet("single", num_classes=10, width=NARROW)
    variables = random_variables(model, jnp.zeros((1, 64, 64, 3)))
    for layer in variables["params"].values():
        layer["bias"] *= 0.0  # else the units differ by their biases more than by the images
    stats = Statistics(np.full((72, 72, 3), 120, np.float32), np.eye(3, dtype=np.float32))
    return inference.Trained(config, model, variables, stats, tuple("0123456789"), 0)


@pytest.fixture(scope="module")
def workdir(network, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("attribution") / "run"
    inference.create(workdir, network.config, network.variables, network.stats, network.class_names)
    return workdir


def compiled(function, variables, x, *more):
    return jax.jit(lambda v, x: function(MODEL, v, x, LABELS, *more))(variables, x)


def test_saliency_is_the_slope_along_each_pixel(variables, x):
    """By finite differences at pixels of the largest and of other saliency."""
    found = np.asarray(compiled(saliency, variables, x))
    assert found.shape == (2, 95, 95) and found.min() >= 0
    logits = jax.jit(lambda x: MODEL.apply(variables, x))
    for image, label in enumerate(LABELS):
        row, column = np.unravel_index(found[image].argmax(), (95, 95))
        slopes = []
        for channel in range(3):
            step = np.zeros(x.shape, np.float32)
            step[image, row, column, channel] = 0.3
            difference = logits(x + step) - logits(x - step)
            slopes.append(abs(float(difference[image, label])) / 0.6)
        assert max(slopes) == pytest.approx(found[image, row, column], rel=0.1)


def test_grad_cam_is_the_weighted_sum_of_maps(variables, x):
    """Weights by a second computation: the head of the network alone, differentiated by JAX."""
    _, outputs = MODEL.apply(variables, x, features=("relu5",))
    maps = outputs["relu5"]

    def head(maps):  # pool5 to fc8 in plain JAX
        y = jax.lax.reduce_window(maps, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "VALID")
        y = jnp.repeat(jnp.repeat(y, 3, 1), 3, 2).reshape(2, -1)  # 2x2 cells averaged to 6x6
        for name in ("fc6", "fc7", "fc8"):
            layer = variables["params"][name]
            y = y @ layer["kernel"] + layer["bias"]
            y = y if name == "fc8" else jax.nn.relu(y)
        return y[0, 3] + y[1, 1]

    assert maps.shape == (2, 5, 5, 24)
    weights = jax.grad(head)(maps).mean((1, 2))
    want = np.maximum(np.einsum("bhwc,bc->bhw", maps, weights), 0)
    assert want.max() > 0
    found = compiled(grad_cam, variables, x)
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-3 * want.max())
    np.testing.assert_allclose(compiled(grad_cam, variables, x, "features.11"), found)


@pytest.mark.torch
def test_saliency_and_grad_cam_are_those_of_torch_autograd(variables, x):
    from torchvision_stub import torch

    F = torch.nn.functional

    def tensor(array):
        return torch.tensor(np.array(array))

    image = tensor(x).permute(0, 3, 1, 2).requires_grad_()
    y = image
    for n, (stride, padding) in enumerate([(4, 2), (1, 2), (1, 1), (1, 1), (1, 1)], 1):
        layer = variables["params"][f"conv{n}"]
        kernel = tensor(layer["kernel"]).permute(3, 2, 0, 1)
        y = F.relu(F.conv2d(y, kernel, tensor(layer["bias"]), stride, padding))
        if n == 5:
            maps = y
            maps.retain_grad()
        y = F.max_pool2d(y, 3, 2) if n in (1, 2, 5) else y
    y = F.adaptive_avg_pool2d(y, 6).permute(0, 2, 3, 1).flatten(1)
    for name in ("fc6", "fc7", "fc8"):
        layer = variables["params"][name]
        y = y @ tensor(layer["kernel"]) + tensor(layer["bias"])
        y = y if name == "fc8" else F.relu(y)
    (y[0, 3] + y[1, 1]).backward()
    cam = F.relu((maps * maps.grad.mean((2, 3), keepdim=True)).sum(1)).detach().numpy()
    found = compiled(grad_cam, variables, x)
    np.testing.assert_allclose(found, cam, rtol=0, atol=1e-3 * cam.max())
    pixels = image.grad.abs().amax(1).numpy()
    found = np.asarray(compiled(saliency, variables, x))
    assert np.linalg.norm(found - pixels) < 1e-3 * np.linalg.norm(pixels)


@pytest.mark.parametrize("variant", VARIANTS)
def test_last_maps(variant):
    assert last_maps(variant) == "relu5"


def test_grad_cam_needs_maps(variables, x):
    with pytest.raises(UserError, match="relu7 has no maps; choose a layer before"):
        compiled(grad_cam, variables, x, "relu7")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["conv2", pytest.param("fc8", marks=pytest.mark.long)])
def test_maximization_excites_its_own_unit_most(name, network):
    units = [0, 3, 7]
    found = maximize(network, name, units, Ascent(steps=20))
    assert found.shape == (3, 64, 64, 3) and found.dtype == np.uint8
    start = maximize(network, name, units, Ascent(steps=1, rate=0.0, blur=0.0))
    apply = jax.jit(lambda v, x: network.model.apply(v, x, features=(name,))[1][name])

    def excited(images):
        x = (images.astype(np.float32) - network.augment.center_mean) * network.augment.scale
        values = np.asarray(apply(network.variables, x))
        return values.reshape(len(units), -1, values.shape[-1]).mean(1)[:, units]

    assert (np.diag(excited(found)) > excited(start).max(0)).all()
    assert (excited(found).argmax(0) == range(3)).all()  # of the images, its own


def test_blur_and_jitter_make_smoother_images(network):
    def roughness(ascent):
        (found,) = maximize(network, "conv1", [2], ascent).astype(float)
        return np.abs(np.diff(found, axis=0)).mean()

    assert roughness(Ascent(steps=20)) < 0.7 * roughness(Ascent(steps=40, blur=0.0, jitter=0))


@pytest.fixture
def draw(capsys):
    def run(*words):
        with pytest.raises(SystemExit) as ended:
            visualize.main([str(word) for word in words])
        return ended.value.code or 0, *capsys.readouterr()

    return run


def test_attribution_picture(workdir, network, draw, tmp_path):
    pixels = photograph(0, 72, 72)
    (tmp_path / "x.png").write_bytes(encode(pixels, "PNG"))
    out = tmp_path / "a.png"
    code, printed, errors = draw(
        "attribution", workdir, tmp_path / "x.png", "--class", 4, "--out", out
    )
    assert code == 0, errors
    found = attribution.attribute(network, pixels, 4)
    assert printed == f"4: probability {found.probability:.3f}\n{out}\n"
    assert found.probability == pytest.approx(network.predict(pixels[None])[0, 4], abs=1e-5)
    np.testing.assert_array_equal(found.view, pixels[4:68, 4:68])
    figure = attribution.attribution_figure(found, "4")
    figure.savefig(tmp_path / "expected.png")
    np.testing.assert_array_equal(Image.open(out), Image.open(tmp_path / "expected.png"))
    shown = figure.axes[1].images[0].get_array()
    np.testing.assert_array_equal(shown, found.saliency)
    best = attribution.attribute(network, pixels).label
    assert best == network.predict(pixels[None])[0].argmax()


def test_maximize_picture(workdir, draw, tmp_path):
    words = ("--layer", "features.3", "--units", 1, 2, "--steps", 2, "--out", tmp_path / "m.png")
    code, printed, errors = draw("maximize", workdir, *words)
    assert code == 0 and printed.strip() == str(tmp_path / "m.png"), errors
    Image.open(tmp_path / "m.png").verify()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--layer", "fc8", "--units", "10"), "fc8 has no unit 10; choose one from 0 to 9"),
        (("--layer", "fc9"), "unknown layer 'fc9'; the nearest names are fc"),
        (("--layer", "prob", "--units", "1", "--steps", "0"), "--steps 0 must be at least 1"),
    ],
)
def test_errors_are_one_sentence(words, message, workdir, draw, tmp_path):
    code, _, errors = draw("maximize", workdir, *words, "--out", tmp_path / "m.png")
    assert code == 2 and errors.count("\n") == 1 and message in errors
