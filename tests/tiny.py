"""A model, a data set and files small enough to train and to break in a test."""

import functools
import importlib.util
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
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


@functools.cache
def load_tool(name):
    """A file of tools/ as a module."""
    spec = importlib.util.spec_from_file_location(f"tools_{name}", ROOT / f"tools/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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


def encode(number, broken=()):
    """A PNG of one colour; if it is broken, the start of it, or something else."""
    file = io.BytesIO()
    Image.new("RGB", (10, 10), (number, 0, 0)).save(file, "png")
    return (b"<html>" if number % 2 else file.getvalue()[:20]) if number in broken else file.getvalue()


def write_shards(folder, broken=()):
    """Four WebDataset shards of eight images."""
    pytest.importorskip("webdataset")
    folder.mkdir(exist_ok=True)
    for shard in range(4):
        with tarfile.open(folder / f"in-train-{shard}.tar", "w") as archive:
            for number in range(8 * shard, 8 * shard + 8):
                image = encode(number, broken)
                for suffix, data in (("png", image), ("cls", str(number % 2).encode())):
                    member = tarfile.TarInfo(f"{number}.{suffix}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
    options = {"split": "in-train-{0..3}.tar|32"}
    return {"dataset": "wds/in", "root": folder, "train_options": options, "val_options": options}


def write_parquet(folder, broken=()):
    """A Hugging Face data set in four files of eight images; broken bytes go in as bytes."""
    datasets = pytest.importorskip("datasets")
    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0  # it waits after each pass
    folder.mkdir(exist_ok=True)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    for shard in range(4):
        rows = [
            {"image": {"bytes": encode(i, broken), "path": None if i % 4 == 1 else f"{i}.png"}, "label": i % 2}
            for i in range(8 * shard, 8 * shard + 8)
        ]
        datasets.Dataset.from_list(rows, features=features).to_parquet(folder / f"train-{shard}.parquet")
    options = {"split": "train", "num_samples": 32}
    return {"dataset": f"hfids/{folder}", "train_options": options, "val_options": options}
