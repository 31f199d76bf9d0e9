"""The recipes of VideoMamba: each is what was published, and trains."""

import ast
import re
from typing import NamedTuple

import pytest
import timm
from accelerate.state import AcceleratorState

from tests.tiny import ROOT, write_folder, write_image
from vim.engine.config import load_config
from vim.engine.pretrain import trainer_of

CONFIGS = {path.stem: path for path in sorted((ROOT / "configs/videomamba").glob("*.py"))}
# videomamba-SIZE[-mask[-pt]][-fFRAMES][-PIXELS]_GPUSxbBATCH-EPOCHSe_DATA
NAME = re.compile(r"videomamba-(\w+?)(-mask-pt|-mask|)(?:-f(\d+))?(?:-(\d+))?_(\d+)xb(\d+)-(\d+)e_(\w+)")
NUM_CLASSES = {"in1k": 1000, "k400": 400, "ssv2": 174, "breakfast": 10, "coin": 180}


class Facts(NamedTuple):
    """Of the published scripts; `batch` is that of all GPUs in an update, in videos, lr what it gives."""

    batch: int
    lr: float
    epochs: int
    warmup: int
    drop_path: float
    weight_decay: float
    layer_decay: float | None


def facts():
    tiny, small, middle, mask = (0.1, 0.1, 0.75), (0.35, 0.05, 0.75), (0.8, 0.05, 0.75), (0.4, 0.05, 0.8)
    longer = (0.4, 0.05, 0.75)  # of small on long videos
    known = {}
    for frames, batch, lr in ((8, 512, 8e-4), (16, 512, 8e-4), (32, 256, 4e-4), (64, 256, 4e-4)):
        known["tiny", frames, 224, "k400"] = Facts(batch, lr, 70, 5, *tiny)
    for frames, batch, lr in ((8, 512, 8e-4), (16, 512, 8e-4), (32, 256, 4e-4), (64, 128, 2e-4)):
        known["small", frames, 224, "k400"] = Facts(batch, lr, 50, 5, *small)
    for frames, batch, lr, lr_mask in (
        (8, 512, 8e-4, 4e-4),
        (16, 256, 2e-4, 2e-4),
        (32, 128, 1e-4, 1e-4),
        (64, 64, 5e-5, 5e-5),
    ):
        known["middle", frames, 224, "k400"] = Facts(batch, lr, 50, 5, *middle)
        known["middle-mask", frames, 224, "k400"] = Facts(batch, lr_mask, 45, 5, *mask)
    for name, batch, lr, epochs, drop_path in (
        ("tiny", 96, 3.75e-6, 10, 0.1),
        ("small", 128, 5e-6, 6, 0.35),
        ("middle", 32, 1.25e-6, 6, 0.8),
        ("middle-mask", 32, 1.25e-6, 6, 0.4),
    ):
        known[name, 64, 384, "k400"] = Facts(batch, lr, epochs, 2 if epochs == 10 else 1, drop_path, 1e-8, None)
    for frames, batch, lr, lr_mask in ((8, 512, 1.6e-3, 4e-4), (16, 256, 8e-4, 2e-4)):
        known["tiny", frames, 224, "ssv2"] = Facts(512, 1.6e-3, 35, 5, *tiny)
        known["small", frames, 224, "ssv2"] = Facts(512, 1.6e-3, 30, 5, *small)
        known["middle", frames, 224, "ssv2"] = Facts(batch, lr, 30, 5, *middle)
        known["middle-mask", frames, 224, "ssv2"] = Facts(batch, lr_mask, 30, 5, *mask)
    for name, batch, lr, drop_path in (
        ("tiny", 512, 2e-5, 0.1),
        ("small", 192, 7.5e-6, 0.35),
        ("middle", 96, 3.75e-6, 0.8),
        ("middle-mask", 96, 3.75e-6, 0.4),
    ):
        known[name, 16, 288, "ssv2"] = Facts(batch, lr, 10, 2, drop_path, 1e-8, None)
    for data, epochs in (("breakfast", (70, 50, 50, 45)), ("coin", (40, 35, 30, 30))):
        for frames, batch, lr, batch_middle, lr_middle in ((32, 256, 4e-4, 64, 1e-4), (64, 128, 2e-4, 32, 5e-5)):
            known["tiny", frames, 224, data] = Facts(256, 4e-4, epochs[0], 5, *tiny)
            known["small", frames, 224, data] = Facts(batch, lr, epochs[1], 5, *longer)
            known["middle", frames, 224, data] = Facts(batch_middle, lr_middle, epochs[2], 5, 0.8, 0.05, 0.8)
            known["middle-mask", frames, 224, data] = Facts(batch_middle, lr_middle, epochs[3], 5, *mask)
    for name, batch, lr, warmup, drop_path, weight_decay in (
        ("tiny", 4096, 4e-3, 5, 0.0, 0.1),
        ("small", 4096, 4e-3, 5, 0.15, 0.05),
        ("middle", 2048, 2e-3, 20, 0.5, 0.05),
        ("base", 2048, 2e-3, 20, 0.5, 0.05),
    ):
        known[name, None, 224, "in1k"] = Facts(batch, lr, 300, warmup, drop_path, weight_decay, None)
    for name, batches, rates, drop_path in (
        ("tiny", (2048, 1024), (2e-5, 1e-5), 0.0),
        ("small", (512, 512), (5e-6, 5e-6), 0.15),
        ("middle", (512, 512), (5e-6, 5e-6), 0.5),
    ):
        for pixels, batch, lr, epochs in zip((448, 576), batches, rates, (30, 10), strict=True):
            known[name, None, pixels, "in1k"] = Facts(
                batch, lr, epochs, 5 if epochs == 30 else 2, drop_path, 1e-8, None
            )
    for data in ("k400", "ssv2"):
        known["middle-mask-pt", 8, 224, data] = Facts(2048, 1.2e-3, 801, 40, 0.4, 0.05, None)
    return known


FACTS = facts()


def parse(name):
    size, mask, frames, pixels, gpus, batch, epochs, data = NAME.fullmatch(name).groups()
    key = (size + mask, int(frames) if frames else None, int(pixels or 224), data)
    return key, int(gpus), int(batch), int(epochs)


RECIPES = [name for name in CONFIGS if NAME.fullmatch(name)]


def test_there_is_one_for_each_that_was_published():
    assert sorted(map(str, FACTS)) == sorted(str(parse(name)[0]) for name in RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_the_published_recipe(name):
    (kind, frames, pixels, data), gpus, batch, epochs = parse(name)
    config, want = load_config(CONFIGS[name]), FACTS[kind, frames, pixels, data]
    samples = config.data.get("samples", 1)
    assert samples == (2 if frames and "pt" not in kind else 1)
    assert config.data.batch_size == batch
    assert batch * gpus * config.train.get("accumulate", 1) == want.batch * samples
    assert config.optimizer.lr == pytest.approx(want.lr)
    assert (
        (config.schedule.num_epochs, config.schedule.warmup_epochs) == (want.epochs, want.warmup) == (epochs, want[3])
    )
    assert config.model.get("drop_path_rate", 0.0) == want.drop_path
    assert config.optimizer.weight_decay == want.weight_decay
    assert config.optimizer.get("layer_decay") == want.layer_decay
    assert config.train.get("ema_decay") is None
    if frames and samples == 2:
        scale = want.batch * 2 / 256
        assert config.schedule.min_lr == config.schedule.warmup_lr == pytest.approx(1e-6 * scale)
        assert config.data.train_transform.hflip == (0.0 if data == "ssv2" else 0.5)
        assert config.data.video.sampling == ("ssv2" if data == "ssv2" else "sparse")
        aug = "rand-m5-n2-mstd0.25-inc1" if kind == "tiny" else "rand-m7-n4-mstd0.5-inc1"
        assert config.data.train_transform.auto_augment == aug
    assert config.data.get("video", {}).get("num_frames") == frames


@pytest.mark.parametrize("name", RECIPES)
def test_its_weights_and_its_docstring(name):
    (kind, frames, pixels, data), gpus, _, _ = parse(name)
    config = load_config(CONFIGS[name])
    model_name, _, tag = config.model.model_name.partition(".")
    size = kind.split("-")[0]
    assert model_name == f"videomamba_{size}" + (f"_f{frames}" if frames else "")
    assert config.model.get("img_size", 224) == pixels
    assert config.model.get("num_classes", 1000) == (0 if kind.endswith("pt") else NUM_CLASSES[data])
    if tag:
        cfg = timm.get_pretrained_cfg(config.model.model_name)
        assert cfg is not None
        assert config.model.pretrained
    text = " ".join(ast.get_docstring(ast.parse(CONFIGS[name].read_text())).split())
    nodes = f"--nproc-per-node {gpus}" if gpus <= 8 else f"--nnodes {gpus // 8} --nproc-per-node 8"
    assert f"Command: torchrun {nodes} tools/train.py configs/videomamba/{name}.py --cfg-options data.root=PATH" in text
    published = FILES.get((size, kind.endswith("mask"), data, frames, pixels))
    assert published is None or f"Accuracy: {published} % top-1 published" in text


def published_accuracies():
    from vim.models.videomamba import NAME as FILE
    from vim.models.videomamba import PUBLISHED, SIZES

    found = {}
    for file, top1 in PUBLISHED.items():
        size, data, mask, frames, pixels = FILE.fullmatch(file).groups()
        found[SIZES[size], mask == "ft", data, int(frames) if frames else None, int(pixels)] = top1
    return found


FILES = published_accuracies()
SMALL = {
    "model.embed_dim": 16,
    "model.depth": 2,
    "model.img_size": 32,
    "model.pretrained": False,
    "data.batch_size": 8,
    "data.num_workers": 0,
    "schedule.num_epochs": 1,
    "schedule.warmup_epochs": 0,
    "train.accumulate": 1,
}
TEACHERS = {
    "videomamba_small": {"img_size": 32, "embed_dim": 24, "depth": 1},
    "vit_base_patch16_clip_224.openai": {"img_size": 32, "embed_dim": 24, "depth": 1, "num_heads": 2, "num_classes": 7},
}


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """It keeps the precision of the first run of a process."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def write_videos(root):
    """As folders of frames."""
    for part, count in (("train", 8), ("val", 2)):
        lines = []
        for i in range(count):
            for frame in range(3):
                write_image(root / part / str(i) / f"{frame}.png", 40, 48)
            lines.append(f"{part}/{i},{i % 2}\n")
        (root / f"{part}.csv").write_text("".join(lines))
    return root


@pytest.mark.parametrize("name", RECIPES)
def test_it_trains(name, tmp_path, monkeypatch):
    for plot in ("plot_curves", "plot_confusion"):
        monkeypatch.setattr(f"vim.engine.trainer.{plot}", lambda *args: None)
    frames = parse(name)[0][1]
    config = load_config(CONFIGS[name], SMALL)
    if frames:
        config.model.num_frames = config.data.video.num_frames = 2
        config.data.video.pop("classes", None)
        config.data.root = str(write_videos(tmp_path / "data"))
    else:
        config.data.root = str(write_folder(tmp_path / "data"))
    if config.model.get("num_classes") != 0:
        config.model.num_classes = 2
    if "teacher" in config:
        config.teacher.update({**TEACHERS[config.teacher.model_name], "pretrained": False})
        if config.teacher.model_name == "videomamba_small":
            config.teacher.num_classes = 2
    trainer = trainer_of(config)(config, tmp_path / "run")
    assert trainer.updates == config.data.get("samples", 1)
    assert trainer.fit() is not None
    assert trainer.rows[0]["train_loss"] > 0
