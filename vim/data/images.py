"""Finding and reading image files."""

from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from vim.errors import UserError, describe

UNDECODABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # Pillow's exceptions


def read_image(path: str | Path | IO[bytes], mode: str = "RGB", *, name: str | None = None) -> Image.Image:
    """Decode an image file.

    Args:
        mode: PIL's mode for the image: "RGB", or "L" for grey.
        name: its name in messages; by default its path.

    Raises:
        UserError: the file does not exist, or cannot be decoded to an image of 8 bits.
    """
    name = name or str(path)
    try:
        with Image.open(path) as image:
            return convert(image, mode)
    except FileNotFoundError:
        raise UserError(f"no such image: {name} (give the path of an image file)") from None
    except UNDECODABLE as error:
        raise UserError(f"cannot read {name} as an image ({reason(error)}): replace the file or take it out") from None


def convert(image: Image.Image, mode: str) -> Image.Image:
    """Convert an opened image to another mode of 8 bits.

    Raises:
        ValueError: the image has 32 bits per channel.
    """
    if image.mode in ("I", "F"):
        raise ValueError("it has 32 bits a pixel and channel: save it with 8 or 16")
    if image.mode.startswith("I;16"):  # convert() would clip at 255
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    return image.convert(mode)


def reason(error: Exception) -> str:
    """What is wrong with an image. Pillow's own message for an unknown format has an address, so it always differs."""
    return "no image that Pillow knows" if isinstance(error, UnidentifiedImageError) else describe(error)


def find_images(paths: list[Path]) -> list[Path]:
    """Find the image files among paths and below the folders among them, in alphabetical order in each folder.

    Raises:
        UserError: a path does not exist, or a folder has no image.
    """
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise UserError(f"no such file or folder: {path} (give image files, or folders of them)")
        images = (
            [path] if path.is_file() else [p for p in sorted(path.rglob("*")) if p.suffix.lower() in IMG_EXTENSIONS]
        )
        if not images:
            raise UserError(f"no image in {path}: expected files ending in {', '.join(IMG_EXTENSIONS)}")
        found += images
    return found


class ImageFiles(Dataset[tuple[Image.Image, int]]):
    """Image files as PIL images. The label of an image is its index."""

    def __init__(self, paths: Sequence[Path], mode: str) -> None:
        self.paths, self.mode = paths, mode

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return read_image(self.paths[index], self.mode), index


def image_folder(root: Path, mode: str) -> ImageFolder:
    """The data set of a folder that has one folder of images a class.

    Raises:
        UserError: the folder does not exist, has no folder in it, or one without images.
    """
    if not root.is_dir():
        raise UserError(f"no such folder: {root} (expected one folder of images a class in it)")
    try:
        return ImageFolder(str(root), loader=lambda path: read_image(path, mode))
    except FileNotFoundError as error:
        raise UserError(f"{root} must hold one folder of images a class: {str(error).splitlines()[0]}") from None
