"""A bucket on this machine: the part of Google Cloud Storage's JSON API that stores need."""

import contextlib
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import parse_qs, unquote, urlsplit


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def answer(self, code: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def object_name(self) -> str:
        return unquote(urlsplit(self.path).path.partition("/o/")[2])

    def query(self, name: str, default: str = "") -> str:
        return parse_qs(urlsplit(self.path).query).get(name, [default])[0]

    def do_GET(self) -> None:
        objects, name = self.server.objects, self.object_name()
        if not name:
            first, end = self.query("startOffset"), self.query("endOffset", "\U0010ffff")
            items = [{"name": key} for key in sorted(objects) if first <= key < end]
            return self.answer(200, json.dumps({"items": items}).encode())
        if name not in objects:
            return self.answer(404)
        content, size = objects[name], len(objects[name])
        generation = {"x_goog_generation": "1"}
        if not (wanted := self.headers.get("Range")):
            return self.answer(200, content, **generation)
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        start = int(first) if first else size - int(last)
        end = min(int(last) + 1, size) if first and last else size
        whole = {"Content_Range": f"bytes {start}-{end - 1}/{size}"}
        return self.answer(206, content[start:end], **whole, **generation)

    def do_POST(self) -> None:
        name = self.query("name")
        self.server.objects[name] = self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(200, json.dumps({"name": name, "generation": "1"}).encode())

    def do_DELETE(self) -> None:
        found = self.server.objects.pop(self.object_name(), None)
        self.answer(404 if found is None else 204)


@contextlib.contextmanager
def bucket_server() -> Iterator[tuple[dict[str, bytes], dict[str, str]]]:
    """Serves any gs:// bucket. Yields its objects and the environment that points to it."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        server.objects = {}
        Thread(target=server.serve_forever, daemon=True).start()
        address = f"127.0.0.1:{server.server_port}"
        names = {"TENSORSTORE_GCS_HTTP_URL": f"http://{address}", "GCE_METADATA_ROOT": address}
        yield server.objects, names
        server.shutdown()
