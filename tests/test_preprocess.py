"""Preprocessing by name: the same pixels as torchvision, OpenCV and Pillow, in every command."""

import io
import json

import cv2
import foreign
import numpy as np
import pytest
from images import encode, photograph
from PIL import Image

from alexnet_jax import convert, evaluate, export, inference, predict, visualize
from alexnet_jax.analysis.prediction import predict_files
from alexnet_jax.config import default_config
from alexnet_jax.data.augment import Statistics, make_augment
from alexnet_jax.data.decode import decode_square
from alexnet_jax.data.prepare import open_or_prepare
from alexnet_jax.data.preprocess import PREPROCESSING
from alexnet_jax.models.build import build_model
from alexnet_jax.utils.errors import UserError
from alexnet_jax.weights import programs

# Height and width, odd ones among them; wide, tall and square; larger and smaller than the result.
SHAPES = [(97, 131), (131, 97), (64, 64), (255, 301), (333, 401), (40, 57), (57, 40), (75, 200)]
KINDS = {
    "color": {},
    "grayscale": {"mode": "L"},
    "no subsampling": {"subsampling": 0, "quality": 95},
    "progressive": {"progressive": True, "quality": 30},
}


def jpeg(shape, kind="color"):
    return encode(photograph(3, *shape), **KINDS[kind])


def decoded(name, data, size):
    return PREPROCESSING[name].decode(data, size)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_caffe_is_opencvs_bilinear_squash_bit_for_bit(shape, kind):
    data = jpeg(shape, kind)
    bgr = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    expected = cv2.resize(bgr, (64, 64), interpolation=cv2.INTER_LINEAR)[..., ::-1]
    np.testing.assert_array_equal(decoded("caffe", data, 64), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_brainscore_is_pillows_bilinear_squash_bit_for_bit(shape, kind):
    data = jpeg(shape, kind)
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    expected = np.asarray(picture.resize((64, 64), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(decoded("brainscore", data, 64), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_torchvision_is_pillows_bilinear_scaled_to_whole_pixels(shape, kind):
    data, size = jpeg(shape, kind), 64
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    height, width = shape
    if width < height:
        width, height = size, int(size * height / width)
    else:
        width, height = int(size * width / height), size
    scaled = np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR))
    top, left = int(round((height - size) / 2.0)), int(round((width - size) / 2.0))
    expected = scaled[top : top + size, left : left + size]
    np.testing.assert_array_equal(decoded("torchvision", data, size), expected)


@pytest.mark.torch
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [*SHAPES, (375, 500), (500, 333), (601, 257)], ids=str)
def test_center_crop_of_torchvision_and_brainscore_is_that_of_their_transforms(shape, kind):
    from torchvision_stub import torchvision

    transforms = torchvision.transforms
    data = jpeg((min(shape[0], 427), min(shape[1], 640)), kind)
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    usual = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)])
    found = decoded("torchvision", data, 256)[16:240, 16:240]
    np.testing.assert_array_equal(found, np.asarray(usual(picture)))
    squashed = np.asarray(transforms.Resize((224, 224))(picture))
    np.testing.assert_array_equal(decoded("brainscore", data, 224), squashed)


def test_paper_is_the_central_square_as_before():
    data = jpeg((97, 131))
    np.testing.assert_array_equal(decoded("2012", data, 64), decode_square(data, 64))
    assert default_config().preprocess == "2012"


@pytest.mark.parametrize("name", ["torchvision", "caffe", "brainscore"])  # 2012: test_decode.py
def test_every_preprocessing_turns_photographs_upright_and_takes_arrays(name):
    pixels = photograph(1, 97, 131)
    turned = Image.Exif()
    turned[0x0112] = 8  # the stored pixels have to be turned by 90° against the clock
    data = encode(np.rot90(pixels, -1).copy(), "PNG", exif=turned.tobytes())
    upright = encode(pixels, "PNG")
    np.testing.assert_array_equal(decoded(name, data, 64), decoded(name, upright, 64))
    np.testing.assert_array_equal(decoded(name, pixels, 64), decoded(name, upright, 64))
    gray = decoded(name, pixels[..., :1].copy(), 64)
    assert gray.shape == (64, 64, 3) and (gray[..., 0] == gray[..., 2]).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"preprocess": "tf"}, "'tf' does not exist; choose one of 2012, torchvision, caffe"),
        ({"preprocess": "brainscore"}, "set --config.image_size=224, the size"),
    ],
)
def test_unknown_and_unfit_preprocessing_is_rejected(fields, message):
    config = default_config()
    config.update(fields)
    with pytest.raises(UserError, match=message):
        make_augment(config)


# ------------------------------------------------------------------------------------------
# Commands
# ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Returns a folder of two classes, the images of which are no squares."""
    root = tmp_path_factory.mktemp("photographs")
    for split in ("train", "val"):
        for label in range(2):
            place = root / split / f"c{label}"
            place.mkdir(parents=True)
            for n in range(3):
                data = encode(photograph(10 * label + n, 90 + 13 * n, 150))
                (place / f"{n}.jpg").write_bytes(data)
    return root


@pytest.fixture(scope="module")
def workdir(folder, tmp_path_factory):
    """Returns the workdir of a random narrow network that was trained on squashed images."""
    place = tmp_path_factory.mktemp("squashed")
    config = default_config()
    config.parallel = "jit"
    config.preprocess = "caffe"
    config.dataset, config.eval_split = f"folder:{folder}", "val"
    config.data_dir = str(place / "data")
    config.image_size, config.augment.crop_size, config.augment.mean = 72, 64, "channel"
    config.model.variant, config.model.width, config.model.num_classes = "single", 0.1, 2
    config.augment.pixel_scale = 1 / 64
    model, rng = build_model(config), np.random.default_rng(5)
    params = inference.state_shapes(config, model).params
    variables = {
        "params": {
            layer: {
                name: rng.normal(0, np.sqrt(2 / max(1, np.prod(x.shape[:-1]))), x.shape).astype(
                    np.float32
                )
                for name, x in arrays.items()
            }
            for layer, arrays in params.items()
        }
    }
    stats = Statistics(np.full(3, 110, np.float32), np.zeros((3, 3), np.float32))
    inference.create(place / "run", config, variables, stats, ("c0", "c1"))
    return place / "run"


def expected_probabilities(workdir, files, name, size):
    network = inference.load(workdir)
    network.config.image_size = size
    squares = np.stack([decoded(name, file.read_bytes(), size) for file in files])
    return network.predict(squares)


@pytest.mark.parametrize(
    ("words", "name", "size"),
    [
        ([], "caffe", 72),
        (["--preprocess", "2012"], "2012", 72),
        (["--preprocess", "torchvision"], "torchvision", 72),
        (["--preprocess", "brainscore"], "brainscore", 64),
    ],
)
def test_predict_and_evaluate_read_files_by_the_preprocessing_of_the_network_or_the_option(
    words, name, size, workdir, folder, capsys, tmp_path
):
    files = sorted((folder / "val").rglob("*.jpg"))
    expected = expected_probabilities(workdir, files, name, size)
    with pytest.raises(SystemExit, match="0"):
        predict.main([str(workdir), str(folder / "val"), "--json", *words])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for row, probabilities in zip(rows, expected, strict=True):
        found = {p["label"]: p["probability"] for p in row["predictions"]}
        np.testing.assert_allclose([found[0], found[1]], probabilities, rtol=1e-4, atol=1e-6)

    with pytest.raises(SystemExit):
        evaluate.main([str(workdir), "--out", str(tmp_path), *words])
    (row,) = json.loads((tmp_path / "evaluation.json").read_text())
    labels = [int(file.parent.name[1:]) for file in files]
    loss = -np.log(expected[np.arange(len(files)), labels]).mean()
    assert row["loss"] == pytest.approx(loss, rel=1e-4)
    assert len({str(x) for x in expected}) == len(files)  # they differ, so that order counts


def test_export_describes_and_contains_the_preprocessing(workdir, tmp_path):
    network = inference.with_preprocess(inference.load(workdir), "brainscore")
    export.export(network, tmp_path / "a.jaxexport", platforms=("cpu",))
    described = json.loads((tmp_path / "a.jaxexport.json").read_text())["input"]
    assert described["shape"] == ["batch", 64, 64, 3]
    assert "scaled to 64x64 pixels by Pillow" in described["meaning"]


def test_visualize_shows_the_squares_of_the_network(workdir, folder):
    config = inference.load(workdir).config
    file = folder / "val" / "c0" / "1.jpg"
    found = visualize._read_image(file, config)
    np.testing.assert_array_equal(found, decoded("caffe", file.read_bytes(), 72))


def test_stores_hold_squares_of_the_preprocessing(workdir, folder):
    config = inference.load(workdir).config
    store = open_or_prepare(config, ["eval"])["eval"]
    files = sorted((folder / "val").rglob("*.jpg"))
    expected = np.stack([decoded("caffe", file.read_bytes(), 72) for file in files])
    np.testing.assert_array_equal(store.read(np.arange(6))["image"], expected)
    assert "_72_caffe/" in store.path


def test_mean_image_is_cropped_for_a_network_that_sees_whole_squares(workdir):
    network = inference.load(workdir)
    mean = np.random.default_rng(0).uniform(0, 255, (72, 72, 3)).astype(np.float32)
    network.config.augment.mean = "image"
    network = network._replace(stats=network.stats._replace(mean=mean))
    square = photograph(5, 64, 64)
    view = inference.with_preprocess(network, "brainscore").augment.center(square[None])[0]
    np.testing.assert_allclose(view, (square - mean[4:68, 4:68]) / 64, atol=1e-5)


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        (programs.TORCHVISION, "torchvision"),
        (programs.LPIPS, "torchvision"),
        (programs.CAFFE, "caffe"),
        (programs.CUDA_CONVNET, "2012"),
    ],
)
def test_converted_network_carries_the_preprocessing_of_its_program(program, expected):
    config = program.config("paper", 1000, has_mean_image=False)
    assert config.preprocess == expected
    make_augment(config)


@pytest.mark.torch
def test_converted_network_predicts_what_torchvisions_pipeline_does(tmp_path):
    from torchvision_stub import torch, torchvision

    model = torchvision.models.alexnet(num_classes=foreign.CLASSES).eval()
    torch.save(model.state_dict(), tmp_path / "a.pth")
    convert.to_workdir(tmp_path / "a.pth", tmp_path / "run")
    files = [tmp_path / f"{n}.jpg" for n in range(4)]
    for n, file in enumerate(files):
        shape, mode = [(375, 500), (500, 333), (301, 257), (427, 640)][n], ["RGB", "L"][n % 2]
        file.write_bytes(encode(photograph(n, min(shape[0], 427), shape[1]), mode=mode))
    usual = torchvision.transforms.Compose(
        [
            torchvision.transforms.Resize(256),
            torchvision.transforms.CenterCrop(224),
            torchvision.transforms.ToTensor(),
            torchvision.transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    batch = torch.stack([usual(Image.open(file).convert("RGB")) for file in files])
    with torch.no_grad():
        expected = torch.softmax(model(batch), 1).numpy()
    network = inference.load(tmp_path / "run")
    for found, row in zip(predict_files(network, files, "center", 4), expected, strict=True):
        np.testing.assert_allclose(found.probabilities, row[found.labels], rtol=1e-4)
