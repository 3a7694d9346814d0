"""Serves a web page that shows what a trained network predicts for a photograph, and why.

The page shows the five most probable classes, the responses of conv1, and the training images
whose fc7 features are nearest. By default only this machine can open it. It needs Gradio
(`pip install gradio fastapi`), but no internet access.
"""

import argparse
import contextlib
import functools
import hashlib
import importlib.util
import io
import ipaddress
import math
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float32, UInt8
from ml_collections import ConfigDict
from PIL import Image

from alexnet_jax import inference
from alexnet_jax.analysis import figures, neighbors
from alexnet_jax.analysis.features import displayed_outputs
from alexnet_jax.analysis.neighbors import Index
from alexnet_jax.data import augment, decode
from alexnet_jax.data.preprocess import PREPROCESSING, Decoder
from alexnet_jax.data.store import Store, open_store, store_paths
from alexnet_jax.inference import Trained
from alexnet_jax.models.build import variant_name
from alexnet_jax.utils import buckets, process
from alexnet_jax.utils.errors import UserError, exits_cleanly, one_line
from alexnet_jax.utils.files import atomic_write

if TYPE_CHECKING:
    import gradio

MAX_BYTES = 10 * 2**20  # of an upload
MAX_PIXELS = 25_000_000  # of an image; decoding takes up to 24 bytes of memory per pixel
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # Pillow runs Ghostscript for some others

MAX_WAITING = 20  # visitors in the queue; one is served at a time, which bounds memory
MAX_AGE = 600  # seconds for which uploads and the pictures made from them are kept

CLASSES_SHOWN = 5
NEIGHBORS_SHOWN = 8
MIN_SIDE = 224  # pixels of an image on the page
RESPONSES_WIDTH = 900  # pixels, at most, unless the maps need more without being enlarged
UPLOAD_HEIGHT = 230  # pixels
WHITE = 99  # percentile of the responses that is white; the maximum would leave photographs dark
# Gradio's gallery scrolls within a fixed height, and sideways on a phone, with captions cut off.
STYLE = """
#nearest .grid-wrap { height: auto; max-height: none; }
#nearest .caption-label { max-width: 100%; white-space: normal; }
@media (max-width: 640px) { #nearest .grid-container { grid-template-columns: repeat(2, 1fr); } }
"""

# ------------------------------------------------------------------------------------------
# From an upload to the content of the page
# ------------------------------------------------------------------------------------------


class Result(NamedTuple):
    """What the page shows of one image.

    Attributes:
      view: the center crop, which is the network's input.
      classes: probabilities of the most probable classes by name, most probable first.
      responses: output of conv1 after ReLU; 255 is the 99th percentile of all maps, and above.
      nearest: images with their captions (class and distance); empty without an index.
    """

    view: UInt8[np.ndarray, "C C 3"]
    classes: dict[str, float]
    responses: UInt8[np.ndarray, "H W N"]
    nearest: list[tuple[UInt8[np.ndarray, "S S 3"], str]]


def read_upload(
    data: bytes, size: int, decoder: Decoder = decode.decode_square
) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """Decodes an upload like a training image.

    Files that are too large or not images are rejected before any pixel is decoded.

    Raises:
      UserError: the upload is not a complete image within the limits.
    """
    if len(data) > MAX_BYTES:
        raise UserError(f"the file is larger than {MAX_BYTES >> 20} MB; upload a smaller one")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            width, height = picture.size
    except Exception as error:  # Pillow's plugins raise many kinds of exceptions
        raise UserError(
            f"the file is not an image that can be read; upload one of {', '.join(FORMATS)}"
        ) from error
    if width * height > MAX_PIXELS:
        raise UserError(
            f"the image has {width}x{height} pixels, more than {MAX_PIXELS // 10**6} million; "
            "upload a smaller one"
        )
    try:
        return decoder(data, size)
    except decode.UnknownRange as error:
        raise UserError(str(error)) from error
    except Exception as error:
        raise UserError("the image is damaged or truncated; upload another copy") from error


def make_classifier(
    network: Trained, index: Index | None
) -> Callable[[UInt8[np.ndarray, "S S 3"]], Result]:
    """Returns a function from an image to its Result, compiled already."""
    classify = inference.classifier(network)
    conv1 = displayed_outputs(network.model.variant)["conv1"]
    hidden = neighbors.feature_name(network)
    extract = inference.feature_extractor(network, [conv1, hidden])
    size = network.config.image_size

    def result_of(image: np.ndarray) -> Result:
        features = {name: np.asarray(x) for name, x in extract(image[None]).items()}
        responses = features[conv1][0]
        return Result(
            augment.center_window(image, network.augment.view_size),
            most_probable(network.class_names, np.asarray(classify(image[None]))[0]),
            (255 * np.clip(responses / (np.percentile(responses, WHITE) + 1e-12), 0, 1)).astype(
                np.uint8
            ),
            [] if index is None else _nearest(index, features[hidden].reshape(1, -1)),
        )

    result_of(np.zeros((size, size, 3), np.uint8))
    return result_of


def most_probable(names: Sequence[str], log_probs: Float32[np.ndarray, " K"]) -> dict[str, float]:
    """Returns the CLASSES_SHOWN most probable classes with their probabilities, in this order.

    A name that several classes share is followed by the number of the class.
    """
    return {
        names[k] if names.count(names[k]) == 1 else f"{names[k]} ({k})": math.exp(log_probs[k])
        for k in np.argsort(-log_probs, kind="stable")[:CLASSES_SHOWN]
    }


def _nearest(index: Index, query: np.ndarray) -> list[tuple[np.ndarray, str]]:
    (rows,), (distances,) = neighbors.nearest_in_index(index, query, NEIGHBORS_SHOWN)
    found = index.store.read(rows)
    captions = [
        f"{index.store.class_names[label]} (distance {distance:#.3g})"
        for label, distance in zip(found["label"], distances, strict=True)
    ]
    return list(zip(found["image"], captions, strict=True))


def response_sheet(responses: UInt8[np.ndarray, "H W N"]) -> UInt8[np.ndarray, "height width 3"]:
    """Returns all maps in one image, in rows with white lines between them."""
    maps = np.moveaxis(responses, -1, 0)
    columns = math.ceil(math.sqrt(len(maps) * 16 / 6))  # proportions of the paper's Figure 3
    sheet = figures.tile(maps, columns)
    zoom = max(1, RESPONSES_WIDTH // sheet.shape[1])
    return figures.enlarge(np.stack([sheet] * 3, axis=2), zoom)


# ------------------------------------------------------------------------------------------
# The page
# ------------------------------------------------------------------------------------------


def make_page(
    network: Trained,
    index: Index | None,
    result_of: Callable[[np.ndarray], Result],
    folder: Path,
) -> "gradio.Blocks":
    """Returns the page, which shows the result for each image that is dropped on it.

    Args:
      folder: for the pictures on the page.
    """
    import gradio as gr

    with gr.Blocks(
        title="AlexNet", analytics_enabled=False, delete_cache=(MAX_AGE // 10, MAX_AGE)
    ) as page:
        gr.Markdown(
            f"# AlexNet, variant {variant_name(network.config)}\n"
            f"{len(network.class_names):,} classes, trained for {network.step:,} steps"
        )
        message = gr.Markdown(elem_id="message")  # at the top, where a phone shows it
        with gr.Row():
            drop = gr.File(
                label=f"Photograph, up to {MAX_BYTES >> 20} MB",
                file_types=["image"],
                type="binary",  # Gradio's image component would decode differently from training
                scale=2,
                height=UPLOAD_HEIGHT,
                elem_id="drop",
            )
            view = gr.Image(
                label="Input of the network", height=UPLOAD_HEIGHT, scale=2, **_picture("view")
            )
            classes = gr.Label(
                label="Most probable classes",
                num_top_classes=CLASSES_SHOWN,
                show_heading=False,  # class names can be long
                scale=3,
                elem_id="top5",
            )
        gr.Markdown("### Responses of conv1 (bright: strong)")
        responses = gr.Image(show_label=False, **_picture("conv1") | {"buttons": ["fullscreen"]})
        gr.Markdown(_neighbors_heading(index))
        nearest = gr.Gallery(
            show_label=False,
            visible=index is not None,
            columns=NEIGHBORS_SHOWN // 2,
            object_fit="contain",
            height="auto",
            **_picture("nearest"),
        )
        read = functools.partial(
            read_upload,
            size=network.config.image_size,
            decoder=PREPROCESSING[network.config.preprocess].decode,
        )
        drop.upload(
            functools.partial(_update, read, result_of, folder),
            drop,
            [drop, message, view, classes, responses, nearest],
            api_visibility="private",
            concurrency_limit=1,
        )
    return page.queue(max_size=MAX_WAITING)


def _update(
    read: Callable[[bytes], np.ndarray],
    result_of: Callable[[np.ndarray], Result],
    folder: Path,
    data: bytes | None,
) -> tuple[Any, ...]:
    """Returns the new values of the page's components for an upload."""
    empty = None  # for the upload component too, which is then ready for the next file
    try:
        image = read(data or b"")
    except UserError as error:
        return empty, f"⚠️ {error}", empty, empty, empty, empty
    result = result_of(image)
    view, responses, *nearest = (
        _save_picture(image, folder)
        for image in (
            _large_enough(result.view),
            response_sheet(result.responses),
            *(_large_enough(image) for image, _ in result.nearest),
        )
    )
    captions = (caption for _, caption in result.nearest)
    return empty, "", view, result.classes, responses, list(zip(nearest, captions, strict=True))


def _save_picture(image: np.ndarray, folder: Path) -> str:
    """Saves an image under a name made of its pixels' hash, and returns its path.

    Gradio would overwrite an array's file while another visitor downloads the same picture.
    """
    pixels = np.ascontiguousarray(image)
    path = folder / f"{hashlib.sha256(pixels).hexdigest()}.png"
    with atomic_write(path) as new:
        Image.fromarray(pixels).save(new)
    return str(path)


def _neighbors_heading(index: Index | None) -> str:
    if index is None:
        return "No nearest neighbors: the training images are not available."
    return f"### Nearest of {len(index.rows):,} training images, by fc7"


def _picture(name: str) -> dict[str, Any]:
    return {"elem_id": name, "format": "png", "interactive": False, "buttons": []}


def _large_enough(image: np.ndarray) -> np.ndarray:
    return figures.enlarge(image, math.ceil(MIN_SIDE / len(image)))


# ------------------------------------------------------------------------------------------
# The server
# ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """Opens a listening socket; connections wait until there is a page to serve.

    Raises:
      UserError: the port is in use, or the address does not belong to this machine.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        reason = one_line(error).split(" (while")[0]
        raise UserError(
            f"cannot listen on {host}, port {port} ({reason}); choose another --port or --host"
        ) from error
    with listener:
        if not ipaddress.ip_address(listener.getsockname()[0]).is_loopback:
            print(
                f"warning: with --host {host} everyone who can reach this machine can use the page",
                file=sys.stderr,
            )
        yield listener


def serve(page: "gradio.Blocks", listener: socket.socket) -> None:
    """Serves a page until Ctrl-C (KeyboardInterrupt) or SIGTERM."""
    import fastapi
    import gradio as gr
    import uvicorn

    app = gr.mount_gradio_app(
        # max_file_size below limits files only; max_body_size limits every request.
        fastapi.FastAPI(openapi_url=None, max_body_size=MAX_BYTES + 2**16),
        page,
        path="/",
        max_file_size=MAX_BYTES,
        allowed_paths=[],
        show_error=False,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        app_kwargs={"openapi_url": None},
        theme=gr.themes.Default(
            font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
        ),
        css=STYLE,
    )

    received: list[int] = []

    class Server(uvicorn.Server):
        def handle_exit(self, number: int, frame: Any) -> None:
            received.append(number)
            # Open pages hold event streams, for which uvicorn would wait.
            app.routes[-1].app.stop_event.set()
            super().handle_exit(number, frame)

    server = Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
    host, port = listener.getsockname()[:2]
    print(f"serving http://{f'[{host}]' if ':' in host else host}:{port}/", flush=True)
    server.run(sockets=[listener])
    # uvicorn raises a signal again when it has stopped, but within asyncio, which lost it once on a
    # busy machine.
    for number in received:
        signal.raise_signal(number)


def delete_older(folder: Path, seconds: float) -> None:
    """Deletes the files below a folder that were last written more than `seconds` ago."""
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # Gradio has deleted it in the meantime
            if path.is_file() and time.time() - path.stat().st_mtime > seconds:
                path.unlink()


def _delete_old_files_forever(folder: Path) -> None:
    """Gradio deletes the files it knows, which do not include interrupted uploads."""
    while True:
        time.sleep(MAX_AGE)
        delete_older(folder, 2 * MAX_AGE)


def open_training_images(config: ConfigDict, data_dir: str | None) -> Store | None:
    """Opens the train store of a network; prints a message and returns None if there is none.

    Raises:
      UserError: `data_dir` is given and does not contain the store.
    """
    config = ConfigDict(config)
    config.data_dir = data_dir or config.data_dir
    try:
        return open_store(store_paths(config)["train"])
    except UserError as error:
        if data_dir:
            raise
        print(f"no nearest neighbors: {error}, or pass --data-dir", file=sys.stderr)
        return None


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    args = _parse_arguments(argv)
    if importlib.util.find_spec("gradio") is None:
        raise UserError("gradio is not installed; run pip install gradio fastapi")
    # Without this handler, uvicorn's own would end the process before the files are deleted.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    process.set_up()
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(listening(args.host, args.port))
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="alexnet_jax-serve-"))
        threading.Thread(target=_delete_old_files_forever, args=[Path(folder)], daemon=True).start()
        os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False"}
        network = inference.load(args.workdir, needs_classes=True)
        store = open_training_images(network.config, args.data_dir) if args.neighbors else None
        index = neighbors.build_index(network, store, args.neighbors) if store else None
        result_of = make_classifier(network, index)
        serve(make_page(network, index, result_of, Path(folder)), listener)


def _parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m alexnet_jax.serve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "workdir", type=buckets.readable, help="workdir of a training run or of alexnet_jax.convert"
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on (default: %(default)s, which only this machine can reach); "
        "0.0.0.0 means all addresses: everyone who can reach this machine can then use the page",
    )
    parser.add_argument(
        "--port", type=int, default=7860, help="default: %(default)s; 0 chooses a free port"
    )
    parser.add_argument(
        "--data-dir", help="folder with the prepared training data (default: that of the run)"
    )
    parser.add_argument(
        "--neighbors",
        type=int,
        default=2000,
        metavar="N",
        help="search the nearest neighbors among N training images, evenly spaced "
        "(default: %(default)s); 0 shows none",
    )
    args = parser.parse_args(argv)
    if args.neighbors < 0:
        raise UserError(f"--neighbors is {args.neighbors}; it must be 0 or more")
    return args


if __name__ == "__main__":
    main()
