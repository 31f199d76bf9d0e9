"""Short videos of handwritten digits that move: which way is the class, so that no single frame tells.

`python -m vim.data.motion [FOLDER]` writes them, 2,000 to train on and 500 held out, of other digits; the data set
"digit_motion" does so itself where they are missing. A digit moves at a steady speed over a picture whose edges join:
so it is everywhere equally often, whatever its direction; and frames in another order show the line, not which way.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from vim.data.digits import Digits

CLASSES = {"up": (0, -1), "down": (0, 1), "left": (-1, 0), "right": (1, 0)}  # to the right, and down, in a frame
PARTS = {"train": 2000, "val": 500}
SIZE, DIGIT, FRAMES = 32, 16, 16  # pixels of a frame and of a digit, frames of a video
SPEEDS = (1.0, 2.0)  # pixels a frame


def default_folder() -> Path:
    """Where the videos are kept: in $XDG_CACHE_HOME, or in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vim" / "digit_motion"


def ensure(folder: Path) -> None:
    """Write the videos and what lists them (train.csv, val.csv, classes.txt) if the folder does not exist.

    It appears whole; of several processes that do this at a time, the first wins.
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
        except OSError:
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
        _encode(root / path, moving(digit, list(CLASSES.values())[label], rng))
        lines.append(f"{path},{label}\n")
    (root / f"{part}.csv").write_text("".join(lines))


def moving(digit: np.ndarray, direction: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Frames (t, h, w) of a digit that moves: from anywhere, at any of the speeds, over edges that join."""
    canvas = np.zeros((SIZE, SIZE), np.uint8)
    canvas[:DIGIT, :DIGIT] = digit
    start, speed = rng.integers(SIZE, size=2), rng.uniform(*SPEEDS)
    places = [np.round(start + np.array(direction) * speed * time).astype(int) for time in range(FRAMES)]
    return np.stack([np.roll(canvas, (y, x), axis=(0, 1)) for x, y in places])


def _encode(path: Path, frames: np.ndarray) -> None:
    import av

    # the fast code for processors would give other bytes from time to time
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
