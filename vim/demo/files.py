"""Files from the browser: read by the package's own readers, within limits, and refused in a sentence."""

import html
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import gradio as gr
from PIL import Image

from vim.data import read_image, read_video
from vim.errors import UserError
from vim.tasks.classification.predict import Predictor

MOST_BYTES = 64 * 2**20  # of a file
MOST_PIXELS = 2**25  # of a picture or a frame


@contextmanager
def sentences(path: str | None = None) -> Iterator[None]:
    """Have the browser show the text of a UserError, without the folder that the file was put in."""
    try:
        yield
    except UserError as error:
        text = str(error) if path is None else str(error).replace(f"{Path(path).parent}{os.sep}", "")
        raise gr.Error(html.escape(text, quote=False), duration=None, print_exception=False) from None


def read(predictor: Predictor, path: str) -> list[Image.Image]:
    """Read the image, or the frames that the model takes of a video.

    Raises:
        UserError: the file cannot be read, or has more than MOST_PIXELS.
    """
    if predictor.num_frames is None:
        return [read_image(path, predictor.mode, most_pixels=MOST_PIXELS)]
    (first,) = read_video(path, lambda count, fps: [0])
    if first.width * first.height > MOST_PIXELS:
        raise UserError(f"{path} has frames of {first.width} x {first.height} pixels: at most {MOST_PIXELS} expected")
    return predictor.read(Path(path))
