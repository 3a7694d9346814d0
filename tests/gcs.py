"""A bucket on this machine: the part of Google Cloud Storage's JSON API that TensorStore uses."""

import contextlib
import itertools
import json
import time
from collections.abc import Collection, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from urllib.parse import parse_qs, unquote, urlsplit


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else the body waits 40 ms for the headers' acknowledgment

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
        if self.server.refuses:
            return self.answer(403)
        time.sleep(self.server.delay_s)
        objects, name = self.server.objects, self.object_name()
        self.server.gets.append(name)
        if name in self.server.busy:
            self.server.busy.discard(name)
            return self.answer(503)
        if not name:
            first, end = self.query("startOffset"), self.query("endOffset", "\U0010ffff")
            items = [{"name": key} for key in sorted(objects) if first <= key < end]
            return self.answer(200, json.dumps({"items": items}).encode())
        if name not in objects:
            return self.answer(404)
        content, size = objects[name], len(objects[name])
        generation = {"x_goog_generation": str(self.server.generations.get(name, 1))}
        if not (wanted := self.headers.get("Range")):
            return self.answer(200, content, **generation)
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        start = int(first) if first else size - int(last)
        end = min(int(last) + 1, size) if first and last else size
        whole = {"Content_Range": f"bytes {start}-{end - 1}/{size}"}
        return self.answer(206, content[start:end], **whole, **generation)

    def may_write(self, name: str) -> bool:
        """Answers 412 if the object is not of the generation that the client expects."""
        if self.server.refuses:
            self.answer(403)
            return False
        exists = name in self.server.objects
        now = self.server.generations.get(name, 1) if exists else 0
        if int(self.query("ifGenerationMatch", str(now))) == now:
            return True
        self.answer(412)
        return False

    def do_POST(self) -> None:
        name = self.query("name")
        content = self.rfile.read(int(self.headers["Content-Length"]))
        with self.server.lock:
            if not self.may_write(name):
                return
            self.server.objects[name] = content
            self.server.generations[name] = generation = next(self.server.numbers)
        self.answer(200, json.dumps({"name": name, "generation": str(generation)}).encode())

    def do_DELETE(self) -> None:
        with self.server.lock:
            if not self.may_write(self.object_name()):
                return
            found = self.server.objects.pop(self.object_name(), None)
        self.answer(404 if found is None else 204)


@contextlib.contextmanager
def bucket_server(
    refuses: bool = False,
    delay_s: float = 0,
    gets: list[str] | None = None,
    busy: Collection[str] = (),
) -> Iterator[tuple[dict[str, bytes], dict[str, str]]]:
    """Serves any gs:// bucket. Yields its objects and the environment that points to it.

    Args:
      refuses: whether it answers every request with 403.
      delay_s: seconds before it answers a GET.
      gets: collects the names of the objects in the order in which they are requested.
      busy: names of objects whose first GET is answered with 503.
    """
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        server.objects, server.generations = {}, {}
        server.refuses, server.delay_s = refuses, delay_s
        server.gets, server.busy = [] if gets is None else gets, set(busy)
        server.numbers, server.lock = itertools.count(2), Lock()
        Thread(target=server.serve_forever, daemon=True).start()
        address = f"127.0.0.1:{server.server_port}"
        names = {"TENSORSTORE_GCS_HTTP_URL": f"http://{address}", "GCE_METADATA_ROOT": address}
        yield server.objects, names
        server.shutdown()
