"""Downloads a published file once, continues after an interruption, and checks its content."""

import contextlib
import hashlib
import http.client
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

from alexnet_jax.utils.errors import UserError, one_line
from alexnet_jax.utils.files import explain_write_errors

CACHE = Path("~/.cache/alexnet_jax/downloads")
TIMEOUT_S = 30  # without an answer
CHUNK_BYTES = 2**20
NETWORK_ERRORS = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError)


def download(url: str, sha256: str, folder: Path | None = None) -> Path:
    """Returns the path of a file in a folder, after downloading it unless it is there.

    An interrupted download is continued by the next call.

    Args:
      url: of the file.
      sha256: how the SHA-256 of its content starts, in hexadecimal digits.
      folder: default: `CACHE`.

    Raises:
      UserError: the file cannot be downloaded or written, or has other content.
    """
    path = (folder or CACHE).expanduser() / url.rpartition("/")[2]
    part = path.with_name(f"{path.name}.part")
    with explain_write_errors(path, "another HOME"):
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            try:
                _fetch(url, part)
            except NETWORK_ERRORS as error:
                raise UserError(
                    f"{url} cannot be downloaded ({one_line(error)}); run the same command again, "
                    f"which continues, or download it on another machine and copy it to {path}"
                ) from error
            part.replace(path)
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if not found.startswith(sha256):
        raise UserError(
            f"{path} is not {url}: its SHA-256 starts with {found[: len(sha256)]}, and not with "
            f"{sha256}; remove it, and run the same command again"
        )
    return path


def _fetch(url: str, part: Path) -> None:
    """Appends what is missing to a file."""
    start = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE and start:
            return  # the file is complete
        raise
    continues = response.status == http.client.PARTIAL_CONTENT  # else it sends all of it again
    with contextlib.closing(response), part.open("ab" if continues else "wb") as file:
        length = int(response.headers.get("Content-Length") or 0)
        done = start if continues else 0
        expected = done + length
        with tqdm(initial=done, total=expected or None, unit="B", unit_scale=True) as bar:
            while chunk := response.read(CHUNK_BYTES):
                file.write(chunk)
                bar.update(len(chunk))
                done += len(chunk)
    if length and done < expected:
        raise http.client.IncompleteRead(b"", expected - done)
