"""A model, a data set and files small enough to train and to break in a test."""

from pathlib import Path

import numpy as np
from PIL import Image

from vim.data import Digits
from vim.data.datasets import BUILT_IN
from vim.engine.config import load_config

ROOT = Path(__file__).parents[1]
DIGITS = ROOT / "configs/vim/vim-nano_1xb64_digits.py"
FOLDER = ROOT / "configs/vim/vim-nano_1xb64_folder.py"
OPTIONS = {
    "model.model_name": "test_vim",
    "model.patch_size": 4,
    "model.embed_dim": 16,
    "model.depth": 2,
    "data.batch_size": 16,
    "schedule.num_epochs": 2,
    "schedule.warmup_epochs": 0,
}
WORDS = [f"{key}={value}" for key, value in OPTIONS.items()]  # for --cfg-options


class FewDigits(Digits):
    """The first digits of each part."""

    def __init__(self, **options):
        super().__init__(**options)
        self.images, self.labels = self.images[:64], self.labels[:64]


def few_digits(monkeypatch):
    monkeypatch.setitem(BUILT_IN, "digits", FewDigits)


def tiny_config(**options):
    """The digits' config with the tiny model; sections and keys are joined by two underscores."""
    return load_config(DIGITS, {**OPTIONS, **{key.replace("__", "."): value for key, value in options.items()}})


def write_image(path, height=10, width=12):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def write_truncated(path):
    whole = write_image(path, 100, 100).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    return path


def write_folder(root, train=("cat", "dog"), val=("cat", "dog"), count=4):
    for part, names in (("train", train), ("val", val)):
        (root / part).mkdir(parents=True)
        for name in names:
            for i in range(count):
                write_image(root / part / name / f"{i}.png", 10 + i)
    return root
