"""What a page shows of a photograph: rubbish is refused by name, the rest is the network's own."""

import io
import struct
import zlib

import images
import numpy as np
import pytest
from PIL import Image

from alexnet_jax import inference as trained
from alexnet_jax import store
from alexnet_jax.analysis import answer
from alexnet_jax.data import decode
from alexnet_jax.utils.errors import UserError


def png_header(width: int, height: int) -> bytes:
    """A PNG file that claims that many pixels and holds none of them."""
    chunks = b""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    for kind, body in ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")):
        chunks += struct.pack(">I", len(body)) + kind + body
        chunks += struct.pack(">I", zlib.crc32(kind + body))
    return b"\x89PNG\r\n\x1a\n" + chunks


def blank_png(side: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("1", (side, side)).save(buffer, "PNG")
    return buffer.getvalue()


PHOTOGRAPH = images.photograph(0)
RUBBISH = {
    "empty": (b"", "no image that can be read"),
    "text": (b"What is this?" * 50, "no image that can be read"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no image that can be"),
    "cut PNG": (images.encode(PHOTOGRAPH, "PNG")[:2000], "damaged or cut short"),
    "cut JPEG": (images.encode(PHOTOGRAPH)[:1500], "damaged or cut short"),
    "PNG of a header": (png_header(9, 9), "damaged or cut short"),
    "PNG of a giant's header": (png_header(2**31 - 1, 2**31 - 1), "has 2147483647x2147483647 pi"),
    "36 million pixels": (blank_png(6000), "has 6000x6000 pixels, more than 25 million"),
    "11 MB": (images.encode(PHOTOGRAPH) + bytes(11 * 2**20), "larger than 10 MB"),
}


@pytest.mark.parametrize("kind", RUBBISH)
def test_rubbish_is_refused_with_what_is_wrong_with_it(kind):
    data, told = RUBBISH[kind]
    with pytest.raises(UserError, match=told):
        answer.read_upload(data, 64)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_an_upload_is_decoded_as_training_decodes(kind):
    data = images.encode(PHOTOGRAPH, kind)
    np.testing.assert_array_equal(answer.read_upload(data, 64), decode.decode_square(data, 64))


def test_an_upload_is_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # is to be turned by 90 degrees clockwise to be seen
    turned = images.encode(np.rot90(PHOTOGRAPH), "PNG", exif=exif)
    upright = images.encode(PHOTOGRAPH, "PNG")
    np.testing.assert_array_equal(answer.read_upload(turned, 96), answer.read_upload(upright, 96))


@pytest.fixture(scope="module")
def digits_store(digit_stores):
    return digit_stores["train"]


@pytest.fixture(scope="module")
def index(network, digits_store):
    return answer.build_index(network, digits_store, 300)


def test_an_index_holds_images_from_all_over_the_store(network, digits_store, index):
    np.testing.assert_array_equal(np.unique(np.diff(index.rows)), [13, 14])  # 4,000 over 300
    assert index.rows[0] == 0 and index.rows[-1] >= digits_store.num_examples - 14
    expected = trained.feature_extractor(network, ["fc7"])(digits_store.read(index.rows)["image"])
    np.testing.assert_allclose(index.features, expected["fc7"], rtol=1e-4, atol=1e-4)


def test_no_more_images_are_indexed_than_there_are(network, digits_store):
    few = store.Store(**{**vars(digits_store), "num_examples": 130})
    assert answer.build_index(network, few, 2000).rows.tolist() == list(range(130))


def test_an_answer_is_what_the_network_finds(network, digits_store, index):
    batch = digits_store.read(index.rows[40:41])
    found = answer.answerer(network, index)(batch["image"][0])

    np.testing.assert_array_equal(found.seen, batch["image"][0, 4:68, 4:68])
    log_probs = np.asarray(trained.classifier(network)(batch["image"]))[0]
    assert list(found.classes) == [str(k) for k in np.argsort(-log_probs)[:5]]
    np.testing.assert_allclose(
        list(found.classes.values()), np.sort(np.exp(log_probs))[:-6:-1], rtol=1e-4
    )
    conv1 = trained.feature_extractor(network, ["conv1"])(batch["image"])["conv1"][0]
    expected = np.clip(conv1, 0, None) / conv1.max() * 255
    np.testing.assert_allclose(found.responses, expected, atol=1.001)  # rounded down

    (image, caption), *others = found.nearest
    np.testing.assert_array_equal(image, batch["image"][0])  # itself, which is in the index
    label, distance = caption.removesuffix(")").split(" (distance ")
    assert label == str(batch["label"][0]) and float(distance) < 1e-3
    distances = [float(caption.split()[-1].rstrip(")")) for _, caption in others]
    assert len(distances) == 7 and distances == sorted(distances) and distances[0] > 0.01


def test_without_an_index_there_are_no_neighbours(network):
    blank = np.zeros((72, 72, 3), np.uint8)
    assert answer.answerer(network, None)(blank).nearest == []


def test_classes_of_the_same_name_are_told_apart_by_their_numbers():
    log_probs = np.log(np.float32([0.1, 0.5, 0.15, 0.25]))
    found = answer.likeliest(("crane", "crane", "maillot", "tench"), log_probs)
    assert list(found) == ["crane (1)", "tench", "maillot", "crane (0)"]
    np.testing.assert_allclose(list(found.values()), [0.5, 0.25, 0.15, 0.1], rtol=1e-6)


def test_a_sheet_shows_every_map_of_conv1():
    maps = np.arange(96, dtype=np.uint8) * np.ones((55, 55, 1), np.uint8)
    sheet = answer.response_sheet(maps)
    assert sheet.shape == (6 * 56 - 1, 16 * 56 - 1, 3)
    np.testing.assert_array_equal(sheet[28::56, 28::56, 1].ravel(), np.arange(96))
