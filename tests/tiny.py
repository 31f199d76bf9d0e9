"""A model, a data set and files small enough to train and to break in a test."""

import functools
import importlib.util
import io
import re
import tarfile
from pathlib import Path

import av
import numpy as np
import torch
from mmengine.config import Config
from PIL import Image

from vim.data import Digits
from vim.data.datasets import BUILT_IN
from vim.data.series import Series
from vim.engine.config import load_recipe
from vim.engine.weights import Save, read_run
from vim.options import ImageData, ImageRecipe
from vim.tasks.build import build_run

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
VIDEO_FRAMES = 40  # of a video that write_video writes
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

    def __init__(self, *, train, mode="L"):
        super().__init__(train=train, mode=mode)
        self.train = train
        self.images, self.labels = self.images[:64], self.labels[:64]


def few_digits(monkeypatch):
    monkeypatch.setitem(BUILT_IN, "digits", FewDigits)


def tiny_recipe(**options):
    """The digits' recipe with the tiny model; sections and keys are joined by two underscores."""
    options = {key.replace("__", "."): value for key, value in options.items()}
    return load_recipe(DIGITS, ImageRecipe, {**OPTIONS, **options})


def image_data(options):
    """The data options of a recipe, from some of them."""
    return ImageData(**{"batch_size": 1, "num_workers": 0, **options})


def run_of(recipe, work_dir, resume=None):
    """The loop of a recipe, resumed from a save, or from a checkpoint's path, on request."""
    save = Save(resume, read_run(resume)) if isinstance(resume, Path) else resume
    return build_run(recipe, work_dir, save)


def configs_of(family):
    """The configs below configs/FAMILY by name, each file or row of a table as load_recipe takes it."""
    found = {}
    for file in sorted((ROOT / "configs" / family).glob("*.py")):
        rows = Config.fromfile(file, use_environment_variables=False).get("rows", {})
        found |= {row: Path(f"{file}:{row}") for row in rows} or {file.stem: file}
    return found


def write_image(path, height=10, width=12):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def write_turned(path, orientation):
    """A white image, red at its left upper corner once it is upright, stored as a camera held otherwise stores it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((48, 64, 3), 255, np.uint8)
    pixels[:12, :16] = 255, 0, 0
    # by the first row's and the first column's place in EXIF's table, undone
    stored = {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.swapaxes(0, 1),
        6: pixels.swapaxes(0, 1)[::-1],
        7: pixels[::-1, ::-1].swapaxes(0, 1),
        8: pixels.swapaxes(0, 1)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif)
    return path


def is_upright(image):
    red = (np.asarray(image.convert("RGB")).astype(int) @ [1, -1, 0]) > 100
    return image.size == (64, 48) and red[2:10, 2:14].all() and not red[14:].any() and not red[:, 18:].any()


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


def write_labels(root):
    """A CSV file of the images below a folder; each has the label of its folder, and every other one another label."""
    paths = sorted(path.relative_to(root) for path in root.rglob("*.png"))
    rows = [f"{path},{path.parent.name}{';cat' if i % 2 else ''}" for i, path in enumerate(paths)]
    return write_lines(root / "labels.csv", "file,labels", *rows)


def encode(number, broken=()):
    """A PNG of one colour; if it is broken, the start of it, or something else."""
    file = io.BytesIO()
    Image.new("RGB", (10, 10), (number, 0, 0)).save(file, "png")
    return (b"<html>" if number % 2 else file.getvalue()[:20]) if number in broken else file.getvalue()


def write_shards(folder, broken=()):
    """Four WebDataset shards of eight images."""
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
    return {"dataset": "wds/in", "root": str(folder), "train_options": options, "val_options": options}


def write_parquet(folder, broken=()):
    """A Hugging Face data set in four files of eight images; broken bytes go in as bytes."""
    import datasets  # here, because it takes a second

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


def make_series(values, step="h", start="2020-01-01"):
    """Columns a, b, ... of values (n, m) or (n,)."""
    values = np.asarray(values, float)
    values = values[:, None] if values.ndim == 1 else values
    dates = np.datetime64(start, "ns") + np.arange(len(values)) * np.timedelta64(1, step)
    return Series(dates, values, [chr(97 + i) for i in range(values.shape[1])], "it")


def write_lines(path, *lines):
    path.write_text("\n".join(lines) + "\n")
    return path


def write_video(path, codec="libx264", *, count=VIDEO_FRAMES, size=(64, 48), times=None, rotation=0, **options):
    """A video whose frames are grey, and brighter in their left upper corner."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", container_options={"movflags": "faststart"}) as container:
        stream = container.add_stream(codec, rate=10, options={"crf": "10", **options})
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        if rotation:
            stream.set_display_rotation(rotation)
        for number in range(count):
            pixels = np.full((size[1], size[0], 3), 6 * number, np.uint8)
            pixels[:16, :16] = 255
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = number if times is None else times[number]
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def frame_numbers(frames):
    """Which frames these are."""
    return [round(np.asarray(frame.convert("L"))[20:, 20:].mean() / 6) for frame in frames]


def told(*parts):
    """A pattern for pytest.raises: these texts in this order."""
    return ".*".join(re.escape(str(part)) for part in parts)


def write_run(path, model, name, classes, *, thresholds=None, **options):
    """A checkpoint of a run, of a model that timm builds from a name and options."""
    meta = {"model": {"model_name": name, **options}, "classes": list(classes), "eval_transform": {"crop_pct": 1.0}}
    if thresholds is not None:
        meta |= {"task": "multilabel", "thresholds": thresholds}
    torch.save({"model": model.state_dict(), "meta": meta}, path)
    return path
