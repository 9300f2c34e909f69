"""Shows a trained net on a page: words find videos, and a video that is dropped is restored.

    vtp serve RUN [--videos DIR ...] [--port 7860]

RUN is a workdir, or an imported or exported folder. The videos that can be found are those of
`--videos`, or else of the run's evaluation set. Needs gradio: pip install 'vtp_jax[serve]'.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from vtp_jax import api
from vtp_jax.data import video
from vtp_jax.setup import cli
from vtp_jax.show import draw, pictures
from vtp_jax.types import UserError

SHOWN = 8  # videos found for a text
INSTALL = "the page needs gradio: pip install 'vtp_jax[serve]' (or pip install gradio)"


def import_gradio() -> Any:
    """gradio, which is an extra. Raises UserError."""
    try:
        return importlib.import_module("gradio")
    except ImportError:
        raise UserError(INSTALL) from None


def own_videos(model: api.Model) -> list[str]:
    """The files of the first evaluation set of a run; none if it has no set of files."""
    streams = model.run.data.streams
    try:
        paths = streams[next(iter(streams))].table.get("path", []) if streams else []
    except UserError:  # the set is not here
        return []
    return [path for path in paths if os.path.isfile(path)]


def thumbnail(path: str) -> UInt8[np.ndarray, "h w c"]:
    """The frame in the middle of a file."""
    return video.read_frames(path, lambda frames: np.array([frames // 2]))[0]


def find(model: api.Model, index: api.Index, text: str) -> list[tuple[Image.Image, str]]:
    """The pictures of the videos that a text finds, with their scores and names."""
    hits = model.search(text, index, SHOWN)
    return [
        (draw.fit(thumbnail(hit.path), 256), f"{hit.score:.3f}  {Path(hit.path).name}")
        for hit in hits
    ]


def restore(model: api.Model, path: str, caption: str) -> Image.Image:
    """What the net restores of a video, and of its caption if there is one."""
    (made,) = model.reconstruct(path, caption or "")
    return pictures.storyboard(made)


def page(model: api.Model, index: api.Index | None) -> Any:
    """The page, as gradio's Blocks: a tab for each thing that the net can do."""
    gr = import_gradio()

    def told(function: Any) -> Any:
        """With a UserError shown as a message on the page."""

        def call(*args: Any) -> Any:
            try:
                return function(*args)
            except UserError as error:
                raise gr.Error(str(error), print_exception=False) from None

        return call

    def search(text: str) -> Any:
        if not (text or "").strip():
            raise UserError("write what the video shows")
        assert index is not None
        return find(model, index, text)

    def open_restored(path: str | None, caption: str) -> Any:
        if not path:
            raise UserError("drop a video first")
        return restore(model, path, caption)

    with gr.Blocks(title="vtp_jax", analytics_enabled=False) as blocks:
        gr.Markdown(f"# {model.run.config.method['name']}\n`{model.name}`, {', '.join(model.can)}")
        if index is not None:
            with gr.Tab("Search"):
                words = gr.Textbox(label=f"Find among {len(index.paths)} videos", max_lines=1)
                button = gr.Button("Search", variant="primary")
                found = gr.Gallery(label="Found, best first", columns=4, object_fit="contain")
                for start in (words.submit, button.click):
                    start(told(search), words, found, api_name="search")
        if "reconstruct" in model.can:
            with gr.Tab("Restore"):
                clip = gr.File(label="A video", file_types=["video"], type="filepath")
                said = gr.Textbox(label="Its caption (may be empty)", max_lines=1)
                go = gr.Button("Restore", variant="primary")
                shown = gr.Image(label="Input, what the net sees, what it restores", type="pil")
                go.click(told(open_restored), [clip, said], shown, api_name="restore")
    return blocks


def main(argv: Sequence[str]) -> None:
    parser = cli.parser("serve", __doc__)
    parser.add_argument("run", help="a workdir, or an imported or exported folder")
    parser.add_argument("--videos", nargs="+", help="files or folders that can be found")
    parser.add_argument("--step", default="latest", help="a step, latest or best")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0: reachable from elsewhere")
    parser.add_argument("--port", type=int, default=7860)
    args = cli.parse_alone(parser, argv)
    import_gradio()
    model = api.load(args.run, int(args.step) if args.step.isdecimal() else args.step)
    index = None
    if "search" in model.can:
        videos = args.videos or own_videos(model)
        print(f"embedding {len(videos)} files and folders ..." if videos else NONE, flush=True)
        index = model.index(videos) if videos else None
    if index is None and "reconstruct" not in model.can:
        raise UserError(f"{args.run}: nothing to show; the net can {', '.join(model.can)}")
    page(model, index).launch(server_name=args.host, server_port=args.port, quiet=False)


NONE = "no videos to search: the run's evaluation set is not here; pass --videos DIR"

if __name__ == "__main__":
    cli.run(main)
