"""`python -m alexnet_jax.serve`: uploads, results, the command, and the page in a browser."""

import functools
import http.client
import importlib.util
import io
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zlib

import commands
import images
import numpy as np
import pytest
from PIL import Image

from alexnet_jax import inference, serve
from alexnet_jax.analysis import neighbors
from alexnet_jax.data import decode
from alexnet_jax.utils.errors import UserError

TIMEOUT = 120_000  # ms, for slow machines; a test that passes takes a fraction of it
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
)
# Python imports sitecustomize at startup; this one records every connection of the server.
RECORD_CONNECTIONS = """
import os, sys
log = os.open(os.environ["CONNECTIONS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
def record(event, args):
    if event == "socket.connect":
        os.write(log, f"connect {args[1]}\\n".encode())
    if event == "socket.getaddrinfo":
        os.write(log, f"look up {args[0]}\\n".encode())
sys.addaudithook(record)
"""


# ------------------------------------------------------------------------------------------
# Uploads and results
# ------------------------------------------------------------------------------------------


def png_header(width: int, height: int) -> bytes:
    """Returns a PNG file whose header claims this size, without any pixels."""
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
INVALID_UPLOADS = {
    "empty": (b"", "not an image that can be read"),
    "text": (b"What is this?" * 50, "not an image that can be read"),
    "PostScript": (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "not an image that can be read",
    ),
    "truncated PNG": (images.encode(PHOTOGRAPH, "PNG")[:2000], "damaged or truncated"),
    "truncated JPEG": (images.encode(PHOTOGRAPH)[:1500], "damaged or truncated"),
    "PNG header only": (png_header(9, 9), "damaged or truncated"),
    "PNG header of a huge image": (
        png_header(2**31 - 1, 2**31 - 1),
        "has 2147483647x2147483647 pixels",
    ),
    "36 million pixels": (blank_png(6000), "has 6000x6000 pixels, more than 25 million"),
    "floats of any range": (
        images.encode(np.full((9, 9), 1e6, np.float32), "TIFF", "F"),
        "which does not tell what is black and white; save it with 8 bits",
    ),
    "11 MB": (images.encode(PHOTOGRAPH) + bytes(11 * 2**20), "larger than 10 MB"),
}


@pytest.mark.parametrize("kind", INVALID_UPLOADS)
def test_invalid_upload_is_rejected_with_the_reason(kind):
    data, message = INVALID_UPLOADS[kind]
    with pytest.raises(UserError, match=message):
        serve.read_upload(data, 64)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_upload_is_decoded_like_a_training_image(kind):
    data = images.encode(PHOTOGRAPH, kind)
    np.testing.assert_array_equal(serve.read_upload(data, 64), decode.decode_square(data, 64))


def test_upload_is_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation 6: turn by 90 degrees clockwise
    turned = images.encode(np.rot90(PHOTOGRAPH), "PNG", exif=exif)
    upright = images.encode(PHOTOGRAPH, "PNG")
    np.testing.assert_array_equal(serve.read_upload(turned, 96), serve.read_upload(upright, 96))


@pytest.fixture(scope="module")
def index(network, digit_stores):
    return neighbors.build_index(network, digit_stores["train"], 300)


@pytest.fixture(scope="module")
def expected(network, digit_stores, index):
    """Two test digits that the network classifies correctly, with their results, by name."""
    result_of = serve.make_classifier(network, index)
    batch = digit_stores["eval"].read(np.arange(64))
    predicted = np.asarray(inference.classifier(network)(batch["image"])).argmax(1)
    correct = np.flatnonzero(predicted == batch["label"])
    first = correct[0]
    second = next(k for k in correct if predicted[k] != predicted[first])
    return {
        str(predicted[k]): (batch["image"][k], result_of(batch["image"][k]))
        for k in (first, second)
    }


def test_result_matches_the_network_and_the_index(network, digit_stores, index):
    batch = digit_stores["train"].read(index.rows[40:41])
    result = serve.make_classifier(network, index)(batch["image"][0])

    np.testing.assert_array_equal(result.view, batch["image"][0, 4:68, 4:68])
    log_probs = np.asarray(inference.classifier(network)(batch["image"]))[0]
    assert list(result.classes) == [str(k) for k in np.argsort(-log_probs)[:5]]
    np.testing.assert_allclose(
        list(result.classes.values()), np.sort(np.exp(log_probs))[:-6:-1], rtol=1e-4
    )
    relu1 = inference.feature_extractor(network, ["relu1"])(batch["image"])["relu1"][0]
    expected = np.minimum(np.asarray(relu1) / np.percentile(relu1, 99), 1) * 255
    np.testing.assert_allclose(result.responses, expected, atol=1.001)  # rounded down

    (image, caption), *others = result.nearest
    np.testing.assert_array_equal(image, batch["image"][0])  # the query itself is in the index
    label, distance = caption.removesuffix(")").split(" (distance ")
    assert label == str(batch["label"][0]) and float(distance) < 1e-3
    distances = [float(caption.split()[-1].rstrip(")")) for _, caption in others]
    assert len(distances) == 7 and distances == sorted(distances) and distances[0] > 0.01


def test_without_an_index_there_are_no_neighbors(network):
    blank = np.zeros((72, 72, 3), np.uint8)
    assert serve.make_classifier(network, None)(blank).nearest == []


def test_classes_that_share_a_name_have_their_number():
    log_probs = np.log(np.float32([0.1, 0.5, 0.15, 0.25]))
    found = serve.most_probable(("crane", "crane", "maillot", "tench"), log_probs)
    assert list(found) == ["crane (1)", "tench", "maillot", "crane (0)"]
    np.testing.assert_allclose(list(found.values()), [0.5, 0.25, 0.15, 0.1], rtol=1e-6)


def test_response_sheet_has_every_map():
    maps = np.arange(96, dtype=np.uint8) * np.ones((55, 55, 1), np.uint8)
    sheet = serve.response_sheet(maps)
    assert sheet.shape == (6 * 56 - 1, 16 * 56 - 1, 3)
    np.testing.assert_array_equal(sheet[28::56, 28::56, 1].ravel(), np.arange(96))


# ------------------------------------------------------------------------------------------
# The page and the command
# ------------------------------------------------------------------------------------------


def test_port_in_use_and_foreign_address_are_rejected():
    with serve.listening("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} .*in use.*choose another --port"):
            serve.listening("127.0.0.1", port).__enter__()
    for host, number in (("192.0.2.1", 0), ("127.0.0.1", 99999), ("no.such.host.invalid", 0)):
        with pytest.raises(UserError, match=f"cannot listen on {host}, port {number}"):
            serve.listening(host, number).__enter__()


def test_listening_beyond_this_machine_prints_a_warning(capsys):
    with serve.listening("127.0.0.1", 0):
        assert capsys.readouterr().err == ""
    with serve.listening("0.0.0.0", 0):
        assert "everyone who can reach this machine can use the page" in capsys.readouterr().err


def test_missing_training_images_are_an_error_only_with_data_dir(
    trained_run, digits, tmp_path, capsys
):
    settings = inference.saved_config(trained_run)
    assert serve.open_training_images(settings, None).num_examples == 4000
    settings.data_dir = str(tmp_path)
    assert serve.open_training_images(settings, str(digits)).num_examples == 4000
    assert serve.open_training_images(settings, None) is None
    assert "no nearest neighbors: no prepared store at" in capsys.readouterr().err
    with pytest.raises(UserError, match="no prepared store at"):
        serve.open_training_images(settings, str(tmp_path))


def test_delete_older_keeps_new_files(tmp_path):
    for name, age in (("old", 100), ("new", 0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "upload").write_text(name)
        os.utime(tmp_path / name / "upload", times=2 * (time.time() - age,))
    serve.delete_older(tmp_path, 50)
    assert [path.read_text() for path in tmp_path.rglob("upload")] == ["new"]


READ = functools.partial(serve.read_upload, size=72)


def test_update_saves_the_pictures_of_a_result(expected, tmp_path):
    (digit, (image, result)), _ = expected.items()

    def result_of(upload):
        np.testing.assert_array_equal(upload, image)
        return result

    upload = images.encode(image, "PNG")
    upload_value, message, view, classes, responses, nearest = serve._update(
        functools.partial(serve.read_upload, size=len(image)), result_of, tmp_path, upload
    )
    assert (upload_value, message) == (None, "")
    assert next(iter(classes)) == digit and classes == result.classes
    np.testing.assert_array_equal(np.asarray(Image.open(view))[::4, ::4], result.view)
    sheet = serve.response_sheet(result.responses)
    np.testing.assert_array_equal(np.asarray(Image.open(responses)), sheet)
    assert len(nearest) == 8
    for (path, caption), (neighbor, expected_caption) in zip(nearest, result.nearest, strict=True):
        pixels = np.asarray(Image.open(path))
        assert min(pixels.shape[:2]) >= serve.MIN_SIDE
        np.testing.assert_array_equal(pixels[::4, ::4], neighbor)
        assert caption == expected_caption


@pytest.mark.parametrize("kind", INVALID_UPLOADS)
def test_update_shows_only_the_reason_for_an_invalid_upload(kind, tmp_path):
    data, reason = INVALID_UPLOADS[kind]
    _, message, *rest = serve._update(READ, pytest.fail, tmp_path, data or None)
    assert reason in message
    assert rest == [None] * 4 and not list(tmp_path.iterdir())


def test_equal_pixels_share_a_file(tmp_path):
    pixels = images.photograph(0)
    turned = np.ascontiguousarray(pixels[:, ::-1])[:, ::-1]  # the same pixels, with other strides
    changed = pixels.copy()
    changed[-1, -1, -1] ^= 1
    path, again, other = (serve._save_picture(p, tmp_path) for p in (pixels, turned, changed))
    assert path == again != other
    assert sorted(map(str, tmp_path.iterdir())) == sorted([path, other])
    for name, expected_pixels in ((path, pixels), (other, changed)):
        np.testing.assert_array_equal(np.asarray(Image.open(name)), expected_pixels)


def test_heading_has_the_number_of_indexed_images():
    index = neighbors.Index(None, np.arange(1200), np.zeros((1200, 8), np.float32))
    assert serve._neighbors_heading(index) == "### Nearest of 1,200 training images, by fc7"
    assert serve._neighbors_heading(None).startswith("No nearest neighbors")


def test_negative_number_of_neighbors_is_rejected(monkeypatch, capsys):
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # the command replaces it
    with pytest.raises(SystemExit, match="^2$"):
        serve.main(["a workdir", "--neighbors=-1"])
    assert capsys.readouterr().err == "error: --neighbors is -1; it must be 0 or more\n"


@pytest.mark.skipif(importlib.util.find_spec("gradio") is not None, reason="gradio is installed")
def test_missing_gradio_is_reported_with_the_install_command(tmp_path):
    result = commands.run(sys.executable, "-m", "alexnet_jax.serve", str(tmp_path))
    assert result.returncode == 2
    assert result.stderr.endswith(
        "error: gradio is not installed; run pip install gradio fastapi\n"
    )


# ------------------------------------------------------------------------------------------
# In a browser
# ------------------------------------------------------------------------------------------


class Server:
    """The command in its own process, on a free port, with its own folder for temporary files."""

    def __init__(self, folder, workdir, *more):
        self.files, self.connections = folder / "tmp", folder / "connections"
        self.files.mkdir()
        (folder / "sitecustomize.py").write_text(RECORD_CONNECTIONS)
        own = {"TMPDIR": self.files, "CONNECTIONS": self.connections, "PYTHONPATH": folder}
        self.process = subprocess.Popen(
            (sys.executable, "-m", "alexnet_jax.serve", str(workdir), "--port", "0", *more),
            cwd=commands.ROOT,
            env={**os.environ, **{name: str(value) for name, value in own.items()}},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        line = self.process.stdout.readline()
        assert line.startswith("serving http://127.0.0.1:"), self.process.communicate()
        self.url = line.split()[1]
        self.port = int(self.url.rstrip("/").split(":")[-1])

    def stop(self, number: signal.Signals) -> tuple[int, str]:
        """Sends a signal; returns the exit code and the last line on stderr."""
        self.process.send_signal(number)
        errors = self.process.communicate(timeout=60)[1]
        assert "Traceback" not in errors
        assert list(self.files.iterdir()) == []
        connections = self.connections.read_text().splitlines()
        assert [line for line in connections if "127.0.0.1" not in line] == []
        return self.process.returncode, errors.rstrip("\n").split("\n")[-1]


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium; run apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="see requirements-serve.txt")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server(browser, trained_run, digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    server = Server(folder, trained_run, "--data-dir", str(digits), "--neighbors", "300")
    yield server
    assert server.stop(signal.SIGTERM)[0] == 143


@pytest.fixture
def visit(browser):
    """Returns a function that opens a server's page in a new browser context."""
    contexts = []

    def visit(server):
        contexts.append(browser.new_context())
        contexts[-1].set_default_timeout(TIMEOUT)
        page = contexts[-1].new_page()
        page.requested = []
        page.on("request", lambda request: page.requested.append(request.url))
        page.goto(server.url)
        page.locator("#drop").wait_for()
        return page

    yield visit
    for visitor in contexts:
        visitor.close()


def drop(page, name: str, data: bytes) -> None:
    file = {"name": name, "mimeType": "image/png", "buffer": data}
    page.locator("#drop input[type=file]").set_input_files(file)


def picture(page, component: str) -> np.ndarray:
    """Returns the pixels of the first image in a component of the page."""
    response = page.request.get(page.locator(f"{component} img").first.get_attribute("src"))
    return np.asarray(Image.open(io.BytesIO(response.body())).convert("RGB"))


def assert_shown(page, result: serve.Result) -> None:
    """Waits for the best class of a result, then compares everything else."""
    from playwright.sync_api import expect

    best = page.locator("#top5 dt").first
    expect(best).to_have_text(next(iter(result.classes)), timeout=TIMEOUT)
    shown = re.findall(r"^(\w+)\n(\d+)%$", page.locator("#top5").inner_text(), re.M)
    assert dict(shown) == {name: f"{100 * p:.0f}" for name, p in result.classes.items()}
    expect(page.locator("#nearest img")).to_have_count(8, timeout=TIMEOUT)
    captions = page.locator("#nearest").inner_text().split("\n")
    assert captions == [caption for _, caption in result.nearest]
    np.testing.assert_array_equal(picture(page, "#nearest")[::4, ::4], result.nearest[0][0])
    np.testing.assert_array_equal(picture(page, "#view")[::4, ::4], result.view)
    sheet = serve.response_sheet(result.responses)
    np.testing.assert_allclose(picture(page, "#conv1"), sheet, atol=1)


@pytest.mark.browser
def test_dropped_images_are_classified(server, visit, expected):
    page = visit(server)
    for image, result in expected.values():  # the second without clearing the first
        drop(page, "digit.png", images.encode(image, "PNG"))
        assert_shown(page, result)
    assert len(page.requested) > 10
    assert [
        url for url in page.requested if not url.startswith((server.url, "data:", "blob:"))
    ] == []


@pytest.mark.browser
def test_invalid_uploads_show_the_reason_and_the_next_file_works(server, visit, expected):
    from playwright.sync_api import expect

    page = visit(server)
    for data, reason in INVALID_UPLOADS.values():
        drop(page, "invalid.png", data)
        if len(data) > serve.MAX_BYTES:
            toast = page.get_by_text("exceed the maximum allowed size of 10.0 Mb")
            expect(toast).to_be_visible(timeout=TIMEOUT)
        else:
            expect(page.locator("#message")).to_contain_text(reason, timeout=TIMEOUT)
    ((image, result), _) = expected.values()
    drop(page, "digit.png", images.encode(image, "PNG"))
    assert_shown(page, result)
    expect(page.locator("#message")).to_have_text("")
    assert server.process.poll() is None


@pytest.mark.browser
@pytest.mark.parametrize("width, columns", [(390, 2), (1280, 4)])
def test_page_fits_phones_and_wide_screens(server, visit, expected, width, columns):
    page = visit(server)
    page.set_viewport_size({"width": width, "height": 844})
    drop(page, "invalid.png", b"no image")
    page.locator("#message").get_by_text("not an image").wait_for()
    assert page.locator("#message").bounding_box()["y"] < page.locator("#drop").bounding_box()["y"]
    ((image, result), _) = expected.values()
    drop(page, "digit.png", images.encode(image, "PNG"))
    assert_shown(page, result)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    gallery = page.locator("#nearest").bounding_box()
    boxes = [found.bounding_box() for found in page.locator("#nearest .caption-label").all()]
    assert len({box["x"] for box in boxes}) == columns
    for box in boxes:
        assert gallery["x"] <= box["x"] < box["x"] + box["width"] <= gallery["x"] + gallery["width"]
        assert box["y"] + box["height"] <= gallery["y"] + gallery["height"]
    cut = "label => label.scrollWidth > label.clientWidth"
    assert not any(label.evaluate(cut) for label in page.locator("#nearest .caption-label").all())


@pytest.mark.browser
def test_simultaneous_visitors_see_their_own_results(server, visit, expected):
    pages = [visit(server) for _ in range(4)]
    contexts = list(zip(pages, 2 * list(expected.values()), strict=True))
    for page, (image, _) in contexts:
        drop(page, "digit.png", images.encode(image, "PNG"))
    for page, (_, result) in contexts:
        assert_shown(page, result)


def post_status(server, path: str, body: bytes = b"", **headers: str) -> int:
    """Returns the HTTP status of a POST."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request("POST", f"/gradio_api/{path}", body, names)
    return connection.getresponse().status


@pytest.mark.browser
def test_requests_over_the_limit_are_rejected(server):
    upload = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    upload += bytes(serve.MAX_BYTES + 1) + b"\r\n--x--\r\n"
    assert (
        post_status(server, "upload", upload, content_type="multipart/form-data; boundary=x") == 413
    )
    large = str(11 * 2**20)
    assert (
        post_status(server, "upload", content_length=large, content_type="multipart/form-data")
        == 413
    )
    assert post_status(server, "queue/join", content_length=large) == 413


@pytest.mark.browser
def test_other_files_of_the_machine_are_not_served(server):
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(f"{server.url}gradio_api/file={commands.ROOT / 'README.md'}")


@pytest.mark.browser
def test_server_listens_on_loopback_only(server):
    socket.create_connection(("127.0.0.1", server.port)).close()
    with pytest.raises(ConnectionRefusedError):  # as 0.0.0.0 would not
        socket.create_connection(("127.0.0.2", server.port))


@pytest.mark.browser
def test_ctrl_c_ends_the_server_while_a_page_is_open(visit, trained_run, tmp_path, expected):
    server = Server(tmp_path, trained_run, "--neighbors", "0")
    page = visit(server)
    assert page.get_by_text("No nearest neighbors").is_visible()
    digit, (image, _) = next(iter(expected.items()))
    drop(page, "digit.png", images.encode(image, "PNG"))
    page.locator("#top5 dt").first.get_by_text(digit).wait_for()
    assert list(server.files.rglob("digit.png"))
    assert server.stop(signal.SIGINT) == (130, "interrupted")
