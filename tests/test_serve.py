"""The page in a real browser: it answers each visitor, survives rubbish, and keeps to itself."""

import http.client
import importlib.util
import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import commands
import images
import numpy as np
import pytest
from PIL import Image
from test_answer import RUBBISH

from alexnet_jax import inference as trained
from alexnet_jax import serve
from alexnet_jax.analysis import answer
from alexnet_jax.utils.errors import UserError

TIMEOUT = 120_000  # ms; for slow machines, a test that passes never waits so long
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
)
# Python runs a module of this name at its start: here it writes down whom the server speaks to.
NOTING = """
import os, sys
notes = os.open(os.environ["NOTES"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
def note(event, args):
    if event == "socket.connect":
        os.write(notes, f"connect {args[1]}\\n".encode())
    if event == "socket.getaddrinfo":
        os.write(notes, f"look up {args[0]}\\n".encode())
sys.addaudithook(note)
"""


def test_a_port_in_use_and_an_address_elsewhere_are_refused():
    with serve.listening("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} .*in use.*choose another --port"):
            serve.listening("127.0.0.1", port).__enter__()
    for host, number in (("192.0.2.1", 0), ("127.0.0.1", 99999), ("no.such.host.invalid", 0)):
        with pytest.raises(UserError, match=f"cannot listen on {host}, port {number}"):
            serve.listening(host, number).__enter__()


def test_who_opens_it_to_others_is_warned(capsys):
    with serve.listening("127.0.0.1", 0):
        assert capsys.readouterr().err == ""
    with serve.listening("0.0.0.0", 0):
        assert "anybody who reaches this machine can use the page" in capsys.readouterr().err


def test_training_images_may_be_missing_but_not_where_they_were_said_to_be(
    trained_run, digits, tmp_path, capsys
):
    settings = trained.saved_config(trained_run)
    assert serve.training_images(settings, None).num_examples == 4000
    settings.data_dir = str(tmp_path)
    assert serve.training_images(settings, str(digits)).num_examples == 4000
    assert serve.training_images(settings, None) is None
    assert "no nearest neighbours: no prepared store at" in capsys.readouterr().err
    with pytest.raises(UserError, match="no prepared store at"):
        serve.training_images(settings, str(tmp_path))


def test_only_old_files_are_deleted(tmp_path):
    for name, age in (("old", 100), ("new", 0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "upload").write_text(name)
        os.utime(tmp_path / name / "upload", times=2 * (time.time() - age,))
    serve.delete_older(tmp_path, 50)
    assert [path.read_text() for path in tmp_path.rglob("upload")] == ["new"]


def test_an_upload_is_shown_with_its_answer_as_files_for_the_page(expected, tmp_path):
    (digit, (image, answered)), _ = expected.items()

    def answer_of(upload):
        np.testing.assert_array_equal(upload, image)
        return answered

    upload = images.encode(image, "PNG")
    emptied, message, seen, classes, responses, nearest = serve._shown(
        len(image), answer_of, tmp_path, upload
    )
    assert (emptied, message) == (None, "")
    assert next(iter(classes)) == digit and classes == answered.classes
    np.testing.assert_array_equal(np.asarray(Image.open(seen))[::4, ::4], answered.seen)
    sheet = answer.response_sheet(answered.responses)
    np.testing.assert_array_equal(np.asarray(Image.open(responses)), sheet)
    assert len(nearest) == 8
    for (path, caption), (neighbor, told) in zip(nearest, answered.nearest, strict=True):
        pixels = np.asarray(Image.open(path))
        assert min(pixels.shape[:2]) >= serve.LEAST_SIDE
        np.testing.assert_array_equal(pixels[::4, ::4], neighbor)
        assert caption == told


@pytest.mark.parametrize("kind", RUBBISH)
def test_of_rubbish_the_page_shows_what_is_wrong_with_it_and_nothing_else(kind, tmp_path):
    data, told = RUBBISH[kind]
    _, message, *rest = serve._shown(72, pytest.fail, tmp_path, data or None)
    assert told in message
    assert rest == [None] * 4 and not list(tmp_path.iterdir())


def test_the_same_pixels_are_the_same_file_and_others_another(tmp_path):
    pixels = images.photograph(0)
    turned = np.ascontiguousarray(pixels[:, ::-1])[:, ::-1]  # the same, in another order
    changed = pixels.copy()
    changed[-1, -1, -1] ^= 1
    path, again, other = (serve._saved(p, tmp_path) for p in (pixels, turned, changed))
    assert path == again != other
    assert sorted(map(str, tmp_path.iterdir())) == sorted([path, other])
    for name, expected_pixels in ((path, pixels), (other, changed)):
        np.testing.assert_array_equal(np.asarray(Image.open(name)), expected_pixels)


def test_the_page_says_how_many_training_images_it_compares_with():
    index = answer.Index(None, np.arange(1200), np.zeros((1200, 8), np.float32))
    assert serve._told_of(index) == "### Nearest of 1,200 training images, by fc7"
    assert serve._told_of(None).startswith("No nearest neighbours")


def test_a_number_of_neighbours_below_none_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # which a command sets
    with pytest.raises(SystemExit, match="^2$"):
        serve.main(["a workdir", "--neighbors=-1"])
    assert capsys.readouterr().err == "error: --neighbors is -1; give 0 or more\n"


@pytest.mark.skipif(importlib.util.find_spec("gradio") is not None, reason="gradio is installed")
def test_without_gradio_the_command_says_what_to_install(tmp_path):
    result = commands.run(sys.executable, "-m", "alexnet_jax.serve", str(tmp_path))
    assert result.returncode == 2
    assert result.stderr.endswith(
        "error: gradio is not installed; run pip install gradio fastapi\n"
    )


class Server:
    """The real command, on a free port, with a folder of its own for temporary files."""

    def __init__(self, folder, workdir, *more):
        self.files, self.notes = folder / "tmp", folder / "notes"
        self.files.mkdir()
        (folder / "sitecustomize.py").write_text(NOTING)
        own = {"TMPDIR": self.files, "NOTES": self.notes, "PYTHONPATH": folder}
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
        """Sends a signal; returns the exit code and the last line on stderr, if there was any."""
        self.process.send_signal(number)
        told = self.process.communicate(timeout=60)[1]
        assert "Traceback" not in told
        assert list(self.files.iterdir()) == []
        assert [x for x in self.notes.read_text().splitlines() if "127.0.0.1" not in x] == []
        return self.process.returncode, told.rstrip("\n").split("\n")[-1]


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
    """Opens a server's page as a new visitor, who goes with the end of the test."""
    visitors = []

    def visit(server):
        visitors.append(browser.new_context())
        visitors[-1].set_default_timeout(TIMEOUT)
        page = visitors[-1].new_page()
        page.asked = []
        page.on("request", lambda request: page.asked.append(request.url))
        page.goto(server.url)
        page.locator("#drop").wait_for()
        return page

    yield visit
    for visitor in visitors:
        visitor.close()


@pytest.fixture(scope="module")
def expected(network, digit_stores):
    """Images of two test digits that the network knows, and what is to be seen of each."""
    index = answer.build_index(network, digit_stores["train"], 300)
    find = answer.answerer(network, index)
    batch = digit_stores["eval"].read(np.arange(64))
    found = np.asarray(trained.classifier(network)(batch["image"])).argmax(1)
    known = np.flatnonzero(found == batch["label"])
    first = known[0]
    second = next(k for k in known if found[k] != found[first])
    return {str(found[k]): (batch["image"][k], find(batch["image"][k])) for k in (first, second)}


def drop(page, name: str, data: bytes) -> None:
    file = {"name": name, "mimeType": "image/png", "buffer": data}
    page.locator("#drop input[type=file]").set_input_files(file)


def picture(page, place: str) -> np.ndarray:
    """Returns the pixels of an image that the page shows."""
    response = page.request.get(page.locator(f"{place} img").first.get_attribute("src"))
    return np.asarray(Image.open(io.BytesIO(response.body())).convert("RGB"))


def assert_shown(page, answered: answer.Answer) -> None:
    """Waits for an answer's best class, and compares all else with it."""
    from playwright.sync_api import expect

    best = page.locator("#top5 dt").first
    expect(best).to_have_text(next(iter(answered.classes)), timeout=TIMEOUT)
    shown = re.findall(r"^(\w+)\n(\d+)%$", page.locator("#top5").inner_text(), re.M)
    assert dict(shown) == {name: f"{100 * p:.0f}" for name, p in answered.classes.items()}
    expect(page.locator("#nearest img")).to_have_count(8, timeout=TIMEOUT)
    captions = page.locator("#nearest").inner_text().split("\n")
    assert captions == [caption for _, caption in answered.nearest]
    np.testing.assert_array_equal(picture(page, "#nearest")[::4, ::4], answered.nearest[0][0])
    np.testing.assert_array_equal(picture(page, "#seen")[::4, ::4], answered.seen)
    sheet = answer.response_sheet(answered.responses)
    np.testing.assert_allclose(picture(page, "#conv1"), sheet, atol=1)


@pytest.mark.browser
def test_a_digit_dropped_on_the_page_is_answered(server, visit, expected):
    page = visit(server)
    for image, answered in expected.values():  # the second with nothing to clear before
        drop(page, "digit.png", images.encode(image, "PNG"))
        assert_shown(page, answered)
    assert len(page.asked) > 10
    assert [url for url in page.asked if not url.startswith((server.url, "data:", "blob:"))] == []


@pytest.mark.browser
def test_rubbish_is_told_of_and_the_next_file_answered(server, visit, expected):
    from playwright.sync_api import expect

    page = visit(server)
    for data, told in RUBBISH.values():
        drop(page, "rubbish.png", data)
        if len(data) > answer.MAX_BYTES:
            toast = page.get_by_text("exceed the maximum allowed size of 10.0 Mb")
            expect(toast).to_be_visible(timeout=TIMEOUT)
        else:
            expect(page.locator("#message")).to_contain_text(told, timeout=TIMEOUT)
    ((image, answered), _) = expected.values()
    drop(page, "digit.png", images.encode(image, "PNG"))
    assert_shown(page, answered)
    expect(page.locator("#message")).to_have_text("")
    assert server.process.poll() is None


@pytest.mark.browser
def test_visitors_at_the_same_time_each_see_their_own(server, visit, expected):
    pages = [visit(server) for _ in range(4)]
    visitors = list(zip(pages, 2 * list(expected.values()), strict=True))
    for page, (image, _) in visitors:
        drop(page, "digit.png", images.encode(image, "PNG"))
    for page, (_, answered) in visitors:
        assert_shown(page, answered)


def refusal(server, path: str, body: bytes = b"", **headers: str) -> int:
    """Returns the HTTP status of a POST."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request("POST", f"/gradio_api/{path}", body, names)
    return connection.getresponse().status


@pytest.mark.browser
def test_what_is_too_large_is_refused_whatever_sends_it(server):
    upload = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    upload += bytes(answer.MAX_BYTES + 1) + b"\r\n--x--\r\n"
    assert refusal(server, "upload", upload, content_type="multipart/form-data; boundary=x") == 413
    large = str(11 * 2**20)
    assert (
        refusal(server, "upload", content_length=large, content_type="multipart/form-data") == 413
    )
    assert refusal(server, "queue/join", content_length=large) == 413


@pytest.mark.browser
def test_no_other_file_can_be_had(server):
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(f"{server.url}gradio_api/file={commands.ROOT / 'README.md'}")


@pytest.mark.browser
def test_it_listens_on_loopback_alone(server):
    socket.create_connection(("127.0.0.1", server.port)).close()
    with pytest.raises(ConnectionRefusedError):  # as 0.0.0.0 would not
        socket.create_connection(("127.0.0.2", server.port))


@pytest.mark.browser
def test_ctrl_c_ends_it_with_a_page_open(visit, trained_run, tmp_path, expected):
    server = Server(tmp_path, trained_run, "--neighbors", "0")
    page = visit(server)
    assert page.get_by_text("No nearest neighbours").is_visible()
    digit, (image, _) = next(iter(expected.items()))
    drop(page, "digit.png", images.encode(image, "PNG"))
    page.locator("#top5 dt").first.get_by_text(digit).wait_for()
    assert list(server.files.rglob("digit.png"))
    assert server.stop(signal.SIGINT) == (130, "interrupted")
