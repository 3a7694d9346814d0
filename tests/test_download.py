"""Downloads from a server on this machine, which is interrupted, wrong, or not there."""

import hashlib
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import foreign
import numpy as np
import pytest
import safetensors.numpy
from test_convert_torch import named

from alexnet_jax import inference
from alexnet_jax.utils.download import download
from alexnet_jax.utils.errors import UserError
from alexnet_jax.weights import torchvision

CONTENT = np.random.default_rng(0).bytes(3_000_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@contextmanager
def server(content=CONTENT, ends_after=None, knows_ranges=True):
    """Serves one file, and yields its URL and the list of the ranges that were asked for.

    Args:
      ends_after: bytes after which the first answer ends, although it announced more.
    """
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.headers["Range"])
            start = int(asked[-1].removeprefix("bytes=").rstrip("-")) if knows_ranges else 0
            if start >= len(content):
                return self.send_error(416)
            self.send_response(206 if knows_ranges else 200)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            is_cut = ends_after and len(asked) == 1
            self.wfile.write(content[start : ends_after if is_cut else None])

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}/file.bin", asked
        http.shutdown()


def test_file_is_downloaded_once(tmp_path):
    with server() as (url, asked):
        for _ in range(2):
            path = download(url, SHA256[:8], tmp_path)
            assert path == tmp_path / "file.bin" and path.read_bytes() == CONTENT
    assert asked == ["bytes=0-"]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("knows_ranges", [True, False])
def test_interrupted_download_is_continued(knows_ranges, tmp_path):
    with server(ends_after=1_000_000, knows_ranges=knows_ranges) as (url, asked):
        with pytest.raises(UserError, match="cannot be downloaded .*run the same command again"):
            download(url, SHA256[:8], tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["file.bin.part"]
        assert download(url, SHA256[:8], tmp_path).read_bytes() == CONTENT
    assert asked == ["bytes=0-", "bytes=1000000-"]


def test_process_killed_before_the_last_step_ends_with_the_file(tmp_path):
    (tmp_path / "file.bin.part").write_bytes(CONTENT)
    with server() as (url, _):
        assert download(url, SHA256, tmp_path).read_bytes() == CONTENT


def test_other_content_is_refused_until_it_is_removed(tmp_path):
    message = f"SHA-256 starts with .* and not with {SHA256[:8]}; remove it"
    with server(content=CONTENT[::-1]) as (url, _), pytest.raises(UserError, match=message):
        download(url, SHA256[:8], tmp_path)
    with server() as (url, _):
        with pytest.raises(UserError, match="remove it, and run"):
            download(url, SHA256[:8], tmp_path)
        (tmp_path / "file.bin").unlink()
        download(url, SHA256[:8], tmp_path)


def test_without_a_network_it_says_where_to_put_the_file(tmp_path):
    with server() as (url, _):
        pass
    with pytest.raises(UserError) as raised:
        download(url, SHA256, tmp_path)
    assert f"copy it to {tmp_path / 'file.bin'}" in str(raised.value)
    assert str(raised.value).startswith(f"{url} cannot be downloaded (")
    (tmp_path / "file.bin").write_bytes(CONTENT)
    assert download(url, SHA256, tmp_path) == tmp_path / "file.bin"


def test_convert_downloads_the_network_of_torchvision(tmp_path, monkeypatch):
    weights = foreign.random_weights("owt", bias=0.3)
    content = safetensors.numpy.save(named(weights))
    digest = hashlib.sha256(content).hexdigest()[:8]
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with server(content) as (url, _):
        url = url.replace("file.bin", f"alexnet-owt-{digest}.pth")
        monkeypatch.setattr(torchvision, "URL", url)
        foreign.run_convert("torchvision", tmp_path / "run")
    network = inference.load(tmp_path / "run")
    assert network.class_names[:2] == ("tench", "goldfish")
    kernel = network.variables["params"]["conv1"]["kernel"]
    np.testing.assert_array_equal(kernel, weights["conv1"][0].transpose(2, 3, 1, 0))
