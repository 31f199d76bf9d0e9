"""VideoMamba's tables of recipes: each row is what its name says, follows from its batch, and trains."""

import re

import pytest
import timm

from tests.tiny import ROOT, configs_of, run_of, write_folder, write_image
from vim.engine.config import load_recipe
from vim.models import videomamba
from vim.options import ImageRecipe, ImageTrainOptions

# videomamba-SIZE[-mask[-pt]][-fFRAMES][-PIXELS]_DATA
NAME = re.compile(r"videomamba-(\w+?)(-mask-pt|-mask|)(?:-f(\d+))?(?:-(\d+))?_(\w+)")
ROWS = {name: path for name, path in configs_of("videomamba").items() if NAME.fullmatch(name) and ".py:" in str(path)}
DATA = {"in1k": None, "k400": "sparse", "ssv2": "ssv2", "breakfast": "sparse", "coin": "sparse"}


def parse(name):
    size, mask, frames, pixels, data = NAME.fullmatch(name).groups()
    return size, mask, frames and int(frames), int(pixels or 224), data


def published():
    """The accuracy of each published file for one of the data sets, by what its name says; None if it has none."""
    masked = {"ft": "-mask", "pt": "-mask-pt", None: ""}
    found = {}
    for file, top1 in videomamba.PUBLISHED.items():
        size, data, mask, frames, pixels = videomamba.NAME.fullmatch(file).groups()
        if data in DATA:
            found[videomamba.SIZES[size], masked[mask], frames and int(frames), int(pixels), data] = top1
    return found


def test_there_is_a_row_for_each_published_file():
    assert sorted(map(parse, ROWS), key=str) == sorted(published(), key=str)


@pytest.mark.parametrize("data", DATA)
def test_the_accuracies_beside_the_rows(data):
    text = (ROOT / f"configs/videomamba/{data}.py").read_text()
    beside = dict(re.findall(r'"(videomamba-\S+)":[^#]*# ([\d.]+)$', text, re.MULTILINE))
    of_files = {key: str(top1) for key, top1 in published().items() if key[-1] == data and top1 is not None}
    assert {parse(name): top1 for name, top1 in beside.items()} == of_files


@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_what_its_name_says(name):
    size, mask, frames, pixels, data = parse(name)
    recipe = load_recipe(ROWS[name], ImageRecipe)
    model_name, _, tag = recipe.model["model_name"].partition(".")
    assert model_name == f"videomamba_{size}" + (f"_f{frames}" if frames else "")
    assert recipe.model.get("img_size", 224) == pixels
    assert recipe.model.get("num_classes", 1000) == (0 if mask == "-mask-pt" else videomamba.NUM_CLASSES[data])
    assert (recipe.data.video.get("num_frames"), recipe.data.video.get("sampling")) == (frames, DATA[data])
    assert ("mask" in tag) == (mask == "-mask")
    assert (recipe.masking is not None) == (mask == "-mask-pt")
    assert bool(tag) == bool(recipe.model.get("pretrained"))
    assert not tag or timm.get_pretrained_cfg(recipe.model["model_name"])


@pytest.mark.parametrize("name", [name for name in ROWS if "in1k" not in name and "-pt-" not in name])
def test_the_rates_follow_from_the_batch(name):
    """Each rate is for 256 clips per update: the ends of the schedule are 1e-6 of them, the peak a published number."""
    recipe = load_recipe(ROWS[name], ImageRecipe)
    clips = 256 * recipe.schedule["min_lr"] / 1e-6
    assert recipe.schedule["warmup_lr"] == recipe.schedule["min_lr"]
    assert round(clips / recipe.data.batch_size / recipe.train.accumulate, 6) in (8, 16, 32)
    published = [5e-6] if recipe.model.get("img_size") else [1e-4, 2e-4, 4e-4]
    assert round(256 * recipe.optimizer["lr"] / clips, 12) in published


CLIPS = {
    "scale": (0.08, 1.0),
    "ratio": (0.75, 1.3333),
    "hflip": 0.5,
    "interpolation": "bicubic",
    "auto_augment": "rand-m7-n4-mstd0.5-inc1",
    "color_jitter": 0.0,
    "re_prob": 0.25,
    "re_mode": "pixel",
    "re_count": 1,
}


@pytest.mark.parametrize(
    ("name", "model", "optimizer", "schedule", "transform"),
    [
        (
            "videomamba-tiny-f64_coin",
            {"pretrained_cfg_overlay": {"hf_hub_filename": "videomamba_t16_k400_f32_res224.pth"}},
            {"lr": 4e-4, "weight_decay": 0.1, "layer_decay": 0.75},
            (40, 5, 2e-6),
            {"auto_augment": "rand-m5-n2-mstd0.25-inc1"},
        ),
        (
            "videomamba-middle-f32_breakfast",
            {},
            {"lr": 1e-4, "weight_decay": 0.05, "layer_decay": 0.8},
            (50, 5, 5e-7),
            {},
        ),
        (
            "videomamba-middle-mask-f16_ssv2",
            {
                "pretrained_cfg_overlay": {
                    "hf_hub_filename": "videomamba_m16_ssv2_mask_pt_f8_res224.pth",
                    "num_classes": 0,
                }
            },
            {"lr": 2e-4, "weight_decay": 0.05, "layer_decay": 0.8},
            (30, 5, 2e-6),
            {"hflip": 0.0},
        ),
        (
            "videomamba-small-f64-384_k400",
            {"img_size": 384},
            {"lr": 5e-6, "weight_decay": 1e-8},
            (6, 1, 1e-6),
            {},
        ),
    ],
    ids=str,
)
def test_whole_rows_of_clips(name, model, optimizer, schedule, transform):
    size, mask, frames, _, data = parse(name)
    drop = {"tiny": 0.1, "small": 0.35, "middle": 0.8, "middle-mask": 0.4}[size + mask]
    recipe = load_recipe(ROWS[name], ImageRecipe)
    assert recipe.model == {
        "model_name": recipe.model["model_name"],
        "pretrained": True,
        "num_classes": videomamba.NUM_CLASSES[data],
        "drop_path_rate": drop,
        **model,
    }
    assert recipe.optimizer == {"opt": "adamw", **optimizer}
    epochs, warmup, lowest = schedule
    assert recipe.schedule == {
        "sched": "cosine",
        "step_on_epochs": False,
        "num_epochs": epochs,
        "warmup_epochs": warmup,
        "warmup_lr": lowest,
        "min_lr": lowest,
    }
    assert recipe.data.train_transform == {**CLIPS, **transform}
    assert (recipe.data.samples, recipe.data.num_workers) == (2, 10)
    accumulate = 2 if "384" in name else 1
    assert recipe.train == ImageTrainOptions(amp="bf16", smoothing=0.1, accumulate=accumulate)


@pytest.mark.parametrize(
    ("name", "batch", "lr", "decay", "drop", "schedule", "clip_grad"),
    [
        ("videomamba-tiny_in1k", 512, 4e-3, 0.1, 0.0, (300, 5, 1e-6, 1e-5), 5.0),
        ("videomamba-small_in1k", 512, 4e-3, 0.05, 0.15, (300, 5, 1e-6, 1e-5), None),
        ("videomamba-middle_in1k", 128, 2e-3, 0.05, 0.5, (300, 20, 5e-7, 5e-6), 5.0),
        ("videomamba-base_in1k", 128, 2e-3, 0.05, 0.5, (300, 20, 5e-7, 5e-6), 5.0),
        ("videomamba-middle-448_in1k", 32, 5e-6, 1e-8, 0.5, (30, 5, 1e-6, 5e-6), None),
        ("videomamba-tiny-576_in1k", 128, 1e-5, 1e-8, 0.0, (10, 2, 1e-6, 5e-6), None),
    ],
)
def test_whole_rows_of_images(name, batch, lr, decay, drop, schedule, clip_grad):
    recipe = load_recipe(ROWS[name], ImageRecipe)
    keys = ("num_epochs", "warmup_epochs", "warmup_lr", "min_lr")
    assert tuple(recipe.schedule[key] for key in keys) == schedule
    assert recipe.optimizer == {"opt": "adamw", "lr": lr, "weight_decay": decay}
    assert recipe.model.get("drop_path_rate", 0.0) == drop
    assert recipe.train == ImageTrainOptions(amp="bf16", smoothing=0.1, clip_grad=clip_grad)
    of_tiny = "tiny" in name
    assert (recipe.data.batch_size, recipe.data.repeats) == (batch, 1 if of_tiny else 3)
    assert recipe.data.train_transform["auto_augment"] == ("v0r" if of_tiny else "rand-m9-mstd0.5-inc1")
    small = {"model_name": "videomamba_small", "pretrained": True}
    assert recipe.teacher == (small if name in ("videomamba-middle_in1k", "videomamba-base_in1k") else None)


@pytest.mark.parametrize("data", ["k400", "ssv2"])
def test_whole_rows_of_masked_pretraining(data):
    recipe = load_recipe(ROWS[f"videomamba-middle-mask-pt-f8_{data}"], ImageRecipe)
    assert recipe.model == {"model_name": "videomamba_middle_f8", "num_classes": 0, "drop_path_rate": 0.4}
    assert recipe.teacher == {"model_name": "vit_base_patch16_clip_224.openai", "pretrained": True}
    assert (recipe.masking, recipe.mixup) == ({"ratio": 0.8}, None)
    assert recipe.optimizer == {"opt": "adamw", "lr": 1.2e-3, "weight_decay": 0.05, "betas": (0.9, 0.95)}
    keys = ("num_epochs", "warmup_epochs", "warmup_lr", "min_lr", "step_on_epochs")
    assert tuple(recipe.schedule[key] for key in keys) == (801, 40, 0.0, 8e-5, False)
    assert (recipe.data.batch_size, recipe.data.samples, recipe.data.num_workers) == (64, 1, 10)
    assert recipe.data.train_transform == {"scale": (0.4356, 1.0), "ratio": (0.75, 1.3333), "color_jitter": 0.0}
    assert recipe.train == ImageTrainOptions(amp="bf16", smoothing=0.1)


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
    "videomamba_small": {"img_size": 32, "embed_dim": 24, "depth": 1, "num_classes": 2},
    "vit_base_patch16_clip_224.openai": {"img_size": 32, "embed_dim": 24, "depth": 1, "num_heads": 2, "num_classes": 7},
}


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


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("name", ROWS)
def test_it_trains(name, tmp_path):
    frames, recipe, options = parse(name)[2], load_recipe(ROWS[name], ImageRecipe), dict(SMALL)
    if frames:
        options |= {"data.root": str(write_videos(tmp_path / "data")), "model.num_frames": 2}
        options |= {"data.video.num_frames": 2, "data.video.classes": None}
    else:
        options["data.root"] = str(write_folder(tmp_path / "data"))
    if recipe.masking is None:
        options["model.num_classes"] = 2
    if recipe.teacher:
        small = {**TEACHERS[recipe.teacher["model_name"]], "pretrained": False}
        options |= {f"teacher.{key}": value for key, value in small.items()}
    loop = run_of(load_recipe(ROWS[name], ImageRecipe, options), tmp_path / "run")
    assert loop.updates == recipe.data.samples
    assert loop.fit()
    assert loop.rows[0]["train_loss"] > 0
