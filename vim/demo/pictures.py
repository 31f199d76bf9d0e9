"""Plots as the pictures that the browser shows."""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image

from vim.data import read_image


def drawn(draw: Callable[[Path], object]) -> Image.Image:
    """Return the plot that a function writes to a path."""
    with TemporaryDirectory() as folder:
        draw(path := Path(folder, "plot.png"))
        return read_image(path)
