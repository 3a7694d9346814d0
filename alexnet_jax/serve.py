"""A web page that shows what a trained network makes of a photograph dropped on it.

`python -m alexnet_jax.serve WORKDIR` serves it on this machine alone: the five likeliest classes,
the responses of conv1, and the training images whose fc7 features lie nearest. It needs Gradio
(`pip install gradio fastapi`), and no internet.
"""

import argparse
import contextlib
import functools
import hashlib
import importlib.util
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
from typing import TYPE_CHECKING, Any

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from alexnet_jax import inference as trained
from alexnet_jax.analysis.answer import (
    MAX_BYTES,
    NEIGHBORS_SHOWN,
    TOP,
    Answer,
    Index,
    answerer,
    build_index,
    enlarged,
    read_upload,
    response_sheet,
)
from alexnet_jax.data.store import Store, open_store
from alexnet_jax.inference import Trained
from alexnet_jax.store import store_paths
from alexnet_jax.utils import process as runtime
from alexnet_jax.utils.errors import UserError, exits_cleanly, one_line
from alexnet_jax.utils.files import atomic_write

if TYPE_CHECKING:
    import gradio

MAX_WAITING = 20  # visitors in the queue; one is served at a time, which bounds memory
MAX_AGE = 600  # seconds that an upload and the pictures made of it are kept

LEAST_SIDE = 224  # of an image on the page, in pixels
TOP_HEIGHT = 230


def make_page(
    network: Trained,
    index: Index | None,
    answer: Callable[[np.ndarray], Answer],
    folder: Path,
) -> "gradio.Blocks":
    """Returns the page, which shows `answer` of each image that is dropped on it.

    Args:
      folder: for the pictures that it shows.
    """
    import gradio as gr

    with gr.Blocks(
        title="AlexNet", analytics_enabled=False, delete_cache=(MAX_AGE // 10, MAX_AGE)
    ) as page:
        gr.Markdown(
            f"# AlexNet, variant {network.config.model.variant}\n"
            f"{len(network.class_names):,} classes, trained for {network.step:,} steps"
        )
        with gr.Row():
            drop = gr.File(
                label=f"Photograph, up to {MAX_BYTES >> 20} MB",
                file_types=["image"],
                type="binary",  # Gradio's own image component decodes, and differently
                scale=2,
                height=TOP_HEIGHT,
                elem_id="drop",
            )
            seen = gr.Image(
                label="What the network sees", height=TOP_HEIGHT, scale=2, **_picture("seen")
            )
            classes = gr.Label(
                label="Likeliest classes",
                num_top_classes=TOP,
                show_heading=False,  # a class's name may be long
                scale=3,
                elem_id="top5",
            )
        message = gr.Markdown(elem_id="message")
        gr.Markdown("### Responses of conv1, brightest where strongest")
        responses = gr.Image(show_label=False, **_picture("conv1"))
        gr.Markdown(_told_of(index))
        nearest = gr.Gallery(
            show_label=False,
            visible=index is not None,
            columns=NEIGHBORS_SHOWN // 2,
            object_fit="contain",
            height="auto",
            **_picture("nearest"),
        )
        drop.upload(
            functools.partial(_shown, network.config.image_size, answer, folder),
            drop,
            [drop, message, seen, classes, responses, nearest],
            api_visibility="private",
            concurrency_limit=1,
        )
    return page.queue(max_size=MAX_WAITING)


def _shown(
    size: int, answer: Callable[[np.ndarray], Answer], folder: Path, data: bytes | None
) -> tuple[Any, ...]:
    """What the page's components show of an upload."""
    empty = None  # also what makes the place to drop free again for the next
    try:
        image = read_upload(data or b"", size)
    except UserError as error:
        return empty, f"⚠️ {error}", empty, empty, empty, empty
    found = answer(image)
    seen, responses, *nearest = (
        _saved(image, folder)
        for image in (
            _large_enough(found.seen),
            response_sheet(found.responses),
            *(_large_enough(image) for image, _ in found.nearest),
        )
    )
    captions = (caption for _, caption in found.nearest)
    return empty, "", seen, found.classes, responses, list(zip(nearest, captions, strict=True))


def _saved(image: np.ndarray, folder: Path) -> str:
    """Gradio itself would write an array anew while another visitor is sent the same picture."""
    pixels = np.ascontiguousarray(image)
    path = folder / f"{hashlib.sha256(pixels).hexdigest()}.png"
    with atomic_write(path) as new:
        Image.fromarray(pixels).save(new)
    return str(path)


def _told_of(index: Index | None) -> str:
    if index is None:
        return "No nearest neighbours: the training images are not at hand."
    return f"### Nearest of {len(index.rows):,} training images, by fc7"


def _picture(name: str) -> dict[str, Any]:
    return {"elem_id": name, "format": "png", "interactive": False, "buttons": []}


def _large_enough(image: np.ndarray) -> np.ndarray:
    return enlarged(image, math.ceil(LEAST_SIDE / len(image)))


@contextlib.contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that listens, and takes visitors as soon as there is a page for them.

    Raises UserError if the port is in use, or the address is none of this machine's.
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
                f"warning: with --host {host} anybody who reaches this machine can use the page",
                file=sys.stderr,
            )
        yield listener


def serve(page: "gradio.Blocks", listener: socket.socket) -> None:
    """Serves a page until Ctrl-C (KeyboardInterrupt) or SIGTERM."""
    import fastapi
    import gradio as gr
    import uvicorn

    app = gr.mount_gradio_app(
        # beside max_file_size, which leaves alone what comes in other fields and requests
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
    )

    class Server(uvicorn.Server):
        def handle_exit(self, *signal_and_frame: Any) -> None:
            app.routes[-1].app.stop_event.set()  # ends the streams that open pages listen to
            super().handle_exit(*signal_and_frame)

    server = Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
    host, port = listener.getsockname()[:2]
    print(f"serving http://{f'[{host}]' if ':' in host else host}:{port}/", flush=True)
    server.run(sockets=[listener])


def delete_older(folder: Path, seconds: float) -> None:
    """Deletes the files below a folder that were last written longer ago."""
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # deleted by its owner meanwhile
            if path.is_file() and time.time() - path.stat().st_mtime > seconds:
                path.unlink()


def _keep_clean(folder: Path) -> None:
    """Gradio deletes what it knows of; not uploads that were broken off."""
    while True:
        time.sleep(MAX_AGE)
        delete_older(folder, 2 * MAX_AGE)


def training_images(config: ConfigDict, data_dir: str | None) -> Store | None:
    """Opens the store that a network was trained on; tells why where it is not at hand.

    Raises UserError if it is not in a data_dir that was asked for.
    """
    config = ConfigDict(config)
    config.data_dir = data_dir or config.data_dir
    try:
        return open_store(store_paths(config)["train"])
    except UserError as error:
        if data_dir:
            raise
        print(f"no nearest neighbours: {error}, or name its --data-dir", file=sys.stderr)
        return None


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    args = _arguments(argv)
    if importlib.util.find_spec("gradio") is None:
        raise UserError("gradio is not installed; run pip install gradio fastapi")
    # Else uvicorn, once it is done, would end the process before the visitors' files are deleted.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    runtime.set_up()
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(listening(args.host, args.port))
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="alexnet_jax-serve-"))
        threading.Thread(target=_keep_clean, args=[Path(folder)], daemon=True).start()
        os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False"}
        network = trained.load(args.workdir)
        store = training_images(network.config, args.data_dir) if args.neighbors else None
        index = build_index(network, store, args.neighbors) if store else None
        serve(make_page(network, index, answerer(network, index), Path(folder)), listener)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m alexnet_jax.serve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("workdir", type=Path, help="of train.py: which network")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on, by default %(default)s, which only this machine reaches; "
        "0.0.0.0 is all addresses, and then anybody who reaches the machine can use the page",
    )
    parser.add_argument(
        "--port", type=int, default=7860, help="default: %(default)s; 0: any that is free"
    )
    parser.add_argument("--data-dir", help="of the training images; default: that of the training")
    parser.add_argument(
        "--neighbors",
        type=int,
        default=2000,
        metavar="N",
        help="how many training images, spread evenly over all of them, the nearest are looked "
        "for in, default: %(default)s; 0: show none",
    )
    args = parser.parse_args(argv)
    if args.neighbors < 0:
        raise UserError(f"--neighbors is {args.neighbors}; give 0 or more")
    return args


if __name__ == "__main__":
    main()
