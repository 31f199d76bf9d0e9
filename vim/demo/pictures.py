"""Tensors and plots as the pictures that the browser shows."""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image
from torch import Tensor

from vim.data import read_image
from vim.tasks.explanation import sheet

LEAST_SIDE = 280  # pixels: browsers enlarge no picture


def shown(picture: Tensor) -> Image.Image:
    """Return a picture (h, w, 3) from 0 to 1, or frames (t, h, w, 3) side by side, as large as LEAST_SIDE."""
    pixels = (sheet(picture) * 255).round().byte().numpy()
    height, width, _ = pixels.shape
    times = -(-LEAST_SIDE // min(height, width))
    return Image.fromarray(pixels).resize((times * width, times * height), Image.Resampling.NEAREST)


def drawn(draw: Callable[[Path], object]) -> Image.Image:
    """Return the plot that a function writes to a path."""
    with TemporaryDirectory() as folder:
        draw(path := Path(folder, "plot.png"))
        return read_image(path)
