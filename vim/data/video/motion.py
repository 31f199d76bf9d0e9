"""Short videos of moving handwritten digits. The class is the direction, so no single frame shows it.

`python -m vim.data.video.motion [FOLDER]` writes 2,000 videos for training, and 500 of other digits to hold out. The
data set "digit_motion" writes them itself where they are missing. A digit moves at constant speed over a picture whose
opposite edges join, so in any direction it is equally often at every place. Shuffled frames show the line along which
it moves, but not the direction.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from vim.data.digits import Digits
from vim.errors import require

CLASSES = {"up": (0, -1), "down": (0, 1), "left": (-1, 0), "right": (1, 0)}  # steps in x (right) and y (down)
PARTS = {"train": 2000, "val": 500}
SIZE, DIGIT, FRAMES = 32, 16, 16  # side of a frame and of a digit in pixels, frames of a video
SPEEDS = (1.0, 2.0)  # range of speeds, in pixels a frame


def default_folder() -> Path:
    """The folder of the videos, in $XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vim" / "digit_motion"


def ensure(folder: Path) -> None:
    """Write the videos, train.csv, val.csv and classes.txt, if the folder does not exist or is empty.

    The folder is written beside and renamed, so it is never incomplete, and several processes may call this at once.
    """
    if folder.is_dir() and any(folder.iterdir()):
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        for part, count in PARTS.items():
            _write_part(beside, part, count)
        (beside / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES))
        beside.chmod(0o755)
        try:
            beside.rename(folder)
        except OSError:  # another process was faster
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _write_part(root: Path, part: str, count: int) -> None:
    digits = Digits(train=part == "train").images
    rng = np.random.default_rng(list(PARTS).index(part))
    (root / part).mkdir()
    lines = []
    for number in range(count):
        label = number % len(CLASSES)
        path = f"{part}/{number:04}.mp4"
        digit = np.asarray(digits[rng.integers(len(digits))].resize((DIGIT, DIGIT), Image.Resampling.BICUBIC))
        encode(root / path, moving(digit, list(CLASSES.values())[label], rng))
        lines.append(f"{path},{label}\n")
    (root / f"{part}.csv").write_text("".join(lines))


def moving(digit: np.ndarray, direction: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Frames (t, h, w) of a digit (16, 16) that moves from a random place at a random speed, and wraps at the edges."""
    canvas = np.zeros((SIZE, SIZE), np.uint8)
    canvas[:DIGIT, :DIGIT] = digit
    start, speed = rng.integers(SIZE, size=2), rng.uniform(*SPEEDS)
    places = [np.round(start + np.array(direction) * speed * time).astype(int) for time in range(FRAMES)]
    return np.stack([np.roll(canvas, (y, x), axis=(0, 1)) for x, y in places])


def encode(path: Path, frames: np.ndarray) -> None:
    """Write grey frames (t, h, w) as an H.264 video of 8 frames a second."""
    av = require("av", "writing videos")
    # x264's assembly code does not always write the same bytes
    options = {"crf": "20", "preset": "veryfast", "threads": "1", "x264-params": "asm=0"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8, options=options)
        stream.width = stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="gray")))
        container.mux(stream.encode())


if __name__ == "__main__":
    ensure(Path(sys.argv[1]) if len(sys.argv) > 1 else default_folder())
