"""Finding and reading image files."""

import os
import stat
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset

from vim.data.files import FORMATS, IMAGES, class_files, files_below
from vim.errors import UserError, describe, no_such, printable

# Pillow's exceptions: its decoders raise what comes, for want of a class of its own
UNDECODABLE = (
    OSError,
    SyntaxError,
    ValueError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    NotImplementedError,
    TypeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)

# How to turn an image upright, by the number under EXIF's tag 0x0112 (Exif 2.32, section 4.6.4): Pillow's own function
# writes the tags anew as well, and fails where they are damaged.
ORIENTATION = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_image(
    path: str | Path | IO[bytes], mode: str = "RGB", *, name: str | None = None, most_pixels: int | None = None
) -> Image.Image:
    """Decode an image file to what a viewer shows: upright, and on white where it is transparent.

    Args:
        mode: PIL's mode for the image: "RGB", or "L" for grey.
        name: its name in messages; by default its path.
        most_pixels: a larger image is refused before it is decoded; by default Pillow's limit of 179 million holds.

    Raises:
        UserError: the file does not exist, or cannot be decoded to an image of 8 bits.
    """
    name = printable(name or str(path))
    try:
        if isinstance(path, str | Path) and not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait
            raise ValueError("it is no regular file")
        with Image.open(path, formats=FORMATS) as image:
            if most_pixels is not None and image.width * image.height > most_pixels:
                raise ValueError(f"it has {image.width} x {image.height} pixels: at most {most_pixels} expected")
            return convert(image, mode)
    except FileNotFoundError:
        raise UserError(f"no such image: {name} (give the path of an image file)") from None
    except UNDECODABLE as error:
        raise UserError(f"cannot read {name} as an image ({reason(error)}): replace the file or take it out") from None


def convert(image: Image.Image, mode: str) -> Image.Image:
    """Convert an opened image to another mode of 8 bits, upright, and on white where it is transparent.

    Raises:
        ValueError: the image has 32 bits per channel.
    """
    _scale_clear_value(image)
    image.load()  # some formats have their tags at the end
    image = _eight_bits(_upright(image))
    if image.mode == "La":  # grey, multiplied by its alpha: Pillow converts it to LA only
        image = image.convert("LA")
    if image.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in image.info or _has_clear_colours(image):
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    image = image.convert(mode)
    image.info = {}  # a second conversion would turn it again
    return image


def _scale_clear_value(image: Image.Image) -> None:
    """Scale the value that PNG calls transparent as Pillow scales pixels, and cut a list of them to 256 colours."""
    clear, raw = image.info.get("transparency"), next((tile[3] for tile in getattr(image, "tile", [])), None)
    if raw in ("L;2", "L;4") and isinstance(clear, int):
        image.info["transparency"] = clear * (85 if raw == "L;2" else 17)
    elif raw == "RGB;16B" and isinstance(clear, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in clear)
    elif isinstance(clear, bytes):
        image.info["transparency"] = clear[:256]


def _upright(image: Image.Image) -> Image.Image:
    try:
        turn = UPRIGHT.get(image.getexif().get(ORIENTATION, 1))
    except UNDECODABLE:  # damaged tags of a sound image
        turn = None
    return image if turn is None else image.transpose(turn)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale a grey image of 16 bits to L, or to LA if one of its values stands for transparency."""
    is_sixteen = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")
    if not is_sixteen and image.mode in ("I", "F"):
        raise ValueError("it has 32 bits a pixel and channel: save it with 8 or 16")
    if not is_sixteen:
        return image
    pixels = np.asarray(image)
    grey = Image.fromarray((pixels // 257).astype(np.uint8))  # convert() would clip at 255
    if (clear := image.info.get("transparency")) is not None:
        grey.putalpha(Image.fromarray(np.where(pixels == clear, 0, 255).astype(np.uint8)))
    return grey


def _has_clear_colours(image: Image.Image) -> bool:
    return image.mode == "P" and image.palette is not None and image.palette.mode.endswith("A")


def reason(error: Exception) -> str:
    """What is wrong with an image. Pillow's own message for an unknown format has an address, so it always differs."""
    return "no image that Pillow knows" if isinstance(error, UnidentifiedImageError) else describe(error)


def find_images(paths: list[Path]) -> list[Path]:
    """Find the image files among paths and below the folders among them, in alphabetical order in each folder.

    Raises:
        UserError: a path does not exist or is neither a file nor a folder, or a folder has no image.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_file():
            found.append(path)
            continue
        if not path.is_dir():
            raise UserError(f"{no_such('file or folder', path)} (give image files, or folders of them)")
        images = files_below(path, IMAGES)
        if not images:
            raise UserError(f"no image in {path}: {IMAGES.expected}")
        found += map(Path, images)
    return found


class ImageFiles(Dataset[tuple[Image.Image, int]]):
    """Image files as PIL images, and their labels.

    Args:
        mode: PIL's mode for the images: "RGB", or "L" for grey.
        targets: the labels; by default each image's own index.
        classes: the names of the classes, if known.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        mode: str,
        targets: Sequence[int] | None = None,
        classes: list[str] | None = None,
    ) -> None:
        self.paths, self.mode, self.classes = paths, mode, classes
        self.targets = range(len(paths)) if targets is None else targets

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return read_image(self.paths[index], self.mode), self.targets[index]


def image_folder(root: Path, mode: str) -> ImageFiles:
    """The data set of a folder that has one folder of images a class; see :func:`class_files` for its errors."""
    classes, files = class_files(root, IMAGES)
    return ImageFiles([path for path, _ in files], mode, [label for _, label in files], classes)
