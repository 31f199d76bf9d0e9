import ast
import re

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2

from tests.tiny import ROOT, FewDigits, configs_of, run_of, write_folder, write_labels
from vim.data import train_transform
from vim.data.datasets import BUILT_IN
from vim.engine.build import build_model
from vim.engine.config import load_recipe
from vim.errors import UserError
from vim.options import ImageRecipe, ImageTrainOptions, SeriesRecipe

IMAGE_FAMILIES = ("vim", "mambamixer", "vmamba", "vssd", "mambar", "mambavision", "s4nd", "deit")
CONFIGS = {name: path for family in IMAGE_FAMILIES for name, path in configs_of(family).items()}
PUBLISHED = [name for name in CONFIGS if name.startswith("vim-") and name.endswith("_in1k")]
FINE_TUNED = [name for name in PUBLISHED if "stride8" in name]
FAMILIES = sorted(path.name for path in (ROOT / "configs").glob("[!_]*"))
FILES = sorted((ROOT / "configs").glob("[!_]*/*.py"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SMALL = {"model.embed_dim": 32, "model.depth": 2}
# by the beginnings of names; the last of four stages has four tokens, without which its A would get no gradient
SMALL_STAGES = {
    "vim2": {"embed_dims": [8] * 4, "channel_dims": [8] * 4, "depths": [1] * 4},
    "vmamba": {"embed_dims": [8] * 4, "depths": [1] * 4},
    "vssd": {"embed_dim": 8, "depths": [1] * 4, "num_heads": [1, 2, 4, 8]},
    "convnext": {"embed_dims": [8] * 4, "depths": [1] * 4, "init": "legs"},
    "mambavision": {"stem_dim": 8, "embed_dim": 8, "depths": [1, 1, 1, 2], "num_heads": [2, 4]},
}


class Eight(FewDigits):
    """One batch."""

    def __init__(self, **options):
        super().__init__(**options)
        self.images, self.labels = self.images[:8], self.labels[:8]


def load(name, options=None):
    return load_recipe(CONFIGS[name], ImageRecipe, options)


def small(name):
    """Options that make the model of a config small."""
    for beginning, options in SMALL_STAGES.items():
        if name.startswith(beginning):
            return {"model.img_size": 64, **{f"model.{key}": value for key, value in options.items()}}
    return {"model.img_size": 32, **SMALL}


def write_checkpoint(path, img_size, model_name="vim_tiny"):
    """Of the model before fine-tuning, as small as in the tests."""
    model = timm.create_model(model_name, img_size=img_size, num_classes=1000, embed_dim=32, depth=2)
    torch.save({"model": model.state_dict(), "epoch": 299}, path)
    return model


# Every config and every page


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_its_docstring(path):
    text = " ".join(ast.get_docstring(ast.parse(path.read_text())).split())
    forecast = path.parent.name == "tsm2"
    assert "Paper: https://arxiv.org/abs/" in text
    assert ("MSE: " if forecast else "Accuracy: ") in text
    assert "Hardware: " in text
    address = re.search(r"Command: [^.]* tools/(?:forecast.py train|train.py) (\S+)", text)[1]
    assert address.split(":")[0] == str(path.relative_to(ROOT))
    load_recipe(ROOT / address, SeriesRecipe if forecast else ImageRecipe)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_configs_that_the_docs_name_exist(page):
    known = {*FILES, *(path for folder in FAMILIES for path in configs_of(folder).values())}
    for address in re.findall(r"configs/[\w/-]+\.py(?::[\w-]+)?|configs/[\w/-]+", page.read_text()):
        assert ROOT / address in known or (ROOT / address).is_dir(), address


# Images


@pytest.mark.parametrize("name", CONFIGS)
def test_it_trains(name, tmp_path, monkeypatch, fresh_accelerate):
    for built_in in BUILT_IN:
        monkeypatch.setitem(BUILT_IN, built_in, Eight)
    options = {**small(name), "data.batch_size": 8, "data.num_workers": 0, "schedule.num_epochs": 1}
    options |= {"schedule.warmup_epochs": 0, "schedule.cooldown_epochs": 0}
    folder = load(name).data.dataset == "folder"
    if folder:  # of three classes, which eight images cannot balance: behind a batch norm the head's bias would stay
        classes = ("cat", "dog", "eel")
        options |= {"data.root": str(write_folder(tmp_path / "data", classes, classes)), "model.num_classes": 3}
        if load(name).data.labels:
            write_labels(tmp_path / "data")
    if load(name).model.get("pretrained"):
        write_checkpoint(tmp_path / "a.pth", 32, load(name).model["model_name"].replace("_stride8", ""))
        options["model.pretrained_cfg_overlay.file"] = str(tmp_path / "a.pth")
    loop = run_of(load(name, options), tmp_path / "run")
    assert loop.updates == 1
    before = {key: value.clone() for key, value in loop.task.model.named_parameters()}
    assert loop.fit()
    assert loop.task.evaluation.images == (12 if folder else 8)
    assert loop.rows[0]["train_loss"] > 0
    assert not [key for key, value in loop.task.model.named_parameters() if torch.equal(value, before[key])]


@pytest.mark.parametrize("name", [name for name in CONFIGS if name.endswith("_in1k")])
def test_a_row_is_what_its_name_says(name):
    recipe = load(name)
    assert recipe.model["model_name"] == re.sub(r"(-stage\d|-mesa)?_in1k$", "", name).replace("-", "_")
    assert recipe.data.dataset == "folder"


@pytest.mark.parametrize("name", [name for name in CONFIGS if not name.endswith("_in1k")])
def test_a_file_is_what_its_name_says(name):
    """1xb64: one process, batches of 64."""
    gpus, batch, dataset = re.search(r"_(\d+)xb(\d+)_(\w+)$", name).groups()
    assert (gpus, load(name).data.batch_size, load(name).data.dataset) == ("1", int(batch), dataset)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_rate_follows_from_the_batch(name):
    """On 8 GPUs; the published rates are for 512 images per update."""
    published = 5e-6 if name in FINE_TUNED else 5e-4 if "tiny" in name else 1e-3
    recipe = load(name)
    assert recipe.optimizer["lr"] == pytest.approx(published * 8 * recipe.data.batch_size / 512)


@pytest.mark.parametrize(
    ("name", "drop_path_rate", "weight_decay", "epochs", "warmup_lr"),
    [("vim-base_in1k", 0.1, 0.05, 300, 1e-6), ("vim-tiny-stride8_in1k", 0.0, 1e-8, 30, 1e-5)],
)
def test_whole_rows(name, drop_path_rate, weight_decay, epochs, warmup_lr):
    recipe = load(name)
    assert recipe.model.get("drop_path_rate", 0.0) == drop_path_rate
    assert {**recipe.optimizer, "lr": 0} == {"opt": "adamw", "lr": 0, "weight_decay": weight_decay}
    assert recipe.schedule == {
        "sched": "cosine",
        "num_epochs": epochs,
        "warmup_epochs": 5,
        "warmup_lr": warmup_lr,
        "min_lr": 1e-5,
        "step_on_epochs": True,
    }
    assert recipe.train == ImageTrainOptions(smoothing=0.1, ema_decay=0.99996)
    assert recipe.data.repeats == 3
    assert recipe.data.train_transform == {
        "scale": (0.08, 1.0),
        "hflip": 0.5,
        "interpolation": "bicubic",
        "auto_augment": "rand-m9-mstd0.5-inc1",
        "color_jitter": 0.3,
        "re_prob": 0.25,
        "re_mode": "pixel",
        "re_count": 1,
    }
    mixup = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "prob": 1.0, "switch_prob": 0.5, "mode": "batch"}
    assert recipe.mixup == mixup


MAMBAVISION = {"opt": "lamb", "lr": 5e-3, "eps": 1e-8}


@pytest.mark.parametrize(
    ("name", "drop_path_rate", "optimizer", "epochs", "rates", "train"),
    [
        ("vmamba-tiny-v0_in1k", 0.1, {"weight_decay": 0.05}, (300, 20), (1e-3, 1e-6, 1e-5), {"clip_grad": 5.0}),
        (
            *("vmamba-base-s1l20_in1k", 0.5, {"weight_decay": 0.05}, (300, 20), (1e-3, 1e-6, 1e-5)),
            {"clip_grad": 5.0, "ema_decay": 0.9999},
        ),
        (
            *("vssd-micro_in1k", 0.2, {"weight_decay": 0.05}, (300, 20), (1e-3, 1e-6, 1e-5)),
            {"clip_grad": 5.0, "ema_decay": 0.9999},
        ),
        (
            *("vssd-base-mesa_in1k", 0.6, {"weight_decay": 0.05}, (300, 20), (6e-4, 1e-6, 6e-6)),
            {"clip_grad": 5.0, "ema_decay": 0.9999, "mesa": 2.0, "mesa_start": 0.25},
        ),
        (
            *("vit-s4nd-base_in1k", 0.1, {"weight_decay": 0.03}, (300, 10), (1e-3, 1e-6, 1e-5)),
            {"ema_decay": 0.99996},
        ),
        (
            *("convnext-s4nd-tiny_in1k", 0.1, {"weight_decay": 0.05}, (300, 20), (4e-3, 1e-6, 1e-5)),
            {},
        ),
        (
            *("mambar-base-stage1_in1k", 0.1, {"weight_decay": 0.05}, (300, 5), (1e-3, 1e-6, 1e-5)),
            {"ema_decay": 0.99996, "smoothing": 0.0},
        ),
        (
            *("mambar-base-stage2_in1k", 0.4, {"weight_decay": 0.05}, (100, 5), (4e-4, 1e-6, 1e-5)),
            {"ema_decay": 0.99996, "smoothing": 0.0},
        ),
        (
            *("mambar-base-stage3_in1k", 0.4, {"weight_decay": 0.1}, (20, 5), (1e-5, 1e-6, 1e-5)),
            {"ema_decay": 0.99996},
        ),
        (
            *("mambavision-b_in1k", 0.3, {**MAMBAVISION, "weight_decay": 0.075}, (300, 35), (5e-3, 1e-6, 5e-6)),
            {"clip_grad": 5.0, "ema_decay": 0.9998, "mesa": 1.0, "mesa_start": 0.3},
        ),
        (
            *("mambavision-l2_in1k", 0.3, {**MAMBAVISION, "weight_decay": 0.12}, (300, 20), (5e-3, 1e-6, 5e-6)),
            {"clip_grad": 5.0, "ema_decay": 0.9998, "mesa": 6.0},
        ),
    ],
)
def test_rows_of_the_other_families(name, drop_path_rate, optimizer, epochs, rates, train):
    """`epochs`: in all, of warm-up; `rates`: highest, first, last."""
    recipe, (lr, warmup_lr, min_lr) = load(name), rates
    assert recipe.model["drop_path_rate"] == drop_path_rate
    assert recipe.optimizer == {"opt": "adamw", "lr": pytest.approx(lr), **optimizer}
    options = ("num_epochs", "warmup_epochs", "warmup_lr", "min_lr")
    assert [recipe.schedule[option] for option in options] == [*epochs, warmup_lr, min_lr]
    assert recipe.schedule.get("cooldown_epochs", 0) == (10 if name.startswith(("mambavision", "vit-s4nd")) else 0)
    assert recipe.train == ImageTrainOptions(**{"amp": "bf16", "smoothing": 0.1, **train})


@pytest.mark.parametrize(
    ("name", "decayed", "spared"),
    [
        ("vmamba-tiny-v0_in1k", {"A_log", "dt_weight", "dt_bias"}, {"D"}),
        ("vmamba-tiny-s1l8_in1k", {"A_log", "dt_weight", "dt_bias"}, {"D"}),
        ("mambar-base-stage1_in1k", {"A_log", "A_b_log"}, {"D", "D_b", "cls_token", "pos_embed", "pos_embed_cls"}),
        ("vssd-tiny_in1k", set(), {"A_log", "D", "dt_bias"}),
        ("mambavision-b_in1k", {"A_log"}, {"D", "gamma"}),
        ("vit-s4nd-base_in1k", {"C", "D"}, {"inv_dt", "A_real", "A_imag", "B", "P"}),
        ("convnext-s4nd-tiny_in1k", {"C", "D"}, {"inv_dt", "A_real", "A_imag", "B", "P", "gamma"}),
    ],
)
def test_what_the_published_recipes_decay(name, decayed, spared):
    """Beside weights and biases, of which those with one dimension are spared."""
    recipe = load(name, {**small(name), "model.pretrained": False})
    model = build_model(recipe.model)
    optimizer = create_optimizer_v2(model, **recipe.optimizer)
    rates = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    found = {True: set(), False: set()}
    for key, parameter in model.named_parameters():
        leaf = key.rpartition(".")[2]
        if leaf in ("weight", "bias"):
            assert rates[id(parameter)] == (recipe.optimizer["weight_decay"] if parameter.dim() > 1 else 0), key
        else:
            found[rates[id(parameter)] > 0].add(leaf)
    assert (found[True], found[False]) == (decayed, spared)


def test_the_stages_of_mambar():
    first, second, third = (load(f"mambar-base-stage{i}_in1k") for i in (1, 2, 3))
    assert (first.model["img_size"], "img_size" in second.model, "img_size" in third.model) == (128, False, False)
    assert [recipe.data.repeats for recipe in (first, second, third)] == [3, 3, 1]
    policies = [recipe.data.train_transform["auto_augment"] for recipe in (first, second, third)]
    assert policies == ["3a", "3a", "rand-m9-mstd0.5-inc1"]
    for recipe, before in ((second, "stage1"), (third, "stage2")):
        assert recipe.model["pretrained_cfg_overlay"]["file"] == f"work_dirs/mambar-base-{before}_in1k/best.pth"
    steps = train_transform(timm.create_model("test_mambar"), second.data.train_transform).transforms
    kinds = ["RandomResizedCropAndInterpolation", "RandomHorizontalFlip", "AutoAugment", "ColorJitter"]
    assert [type(step).__name__ for step in steps] == [*kinds, "MaybeToTensor", "Normalize"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_optimizer_and_the_transform_that_come_of_it(name):
    recipe = load(name, {**SMALL, "model.pretrained": False})
    model = build_model(recipe.model)
    optimizer = create_optimizer_v2(model, **recipe.optimizer)
    assert {(group["betas"], group["eps"]) for group in optimizer.param_groups} == {((0.9, 0.999), 1e-8)}
    decayed = next(group for group in optimizer.param_groups if group["weight_decay"])
    decays_A = any(parameter is model.layers[0].mixer.A_log for parameter in decayed["params"])
    assert decays_A == ("ssd" not in name)  # Mamba-2 has one number a head
    steps = [type(step).__name__ for step in train_transform(model, recipe.data.train_transform).transforms]
    assert steps == [
        "RandomResizedCropAndInterpolation",
        "RandomHorizontalFlip",
        "RandAugment",
        "MaybeToTensor",
        "Normalize",
        "RandomErasing",
    ]


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_learning_rate_of_each_epoch(name):
    recipe = load(name)
    optimizer = create_optimizer_v2(torch.nn.Linear(1, 1), **recipe.optimizer)
    scheduler, num_epochs = create_scheduler_v2(optimizer, **recipe.schedule)
    rates = []
    for epoch in range(num_epochs):
        scheduler.step(epoch)
        rates.append(optimizer.param_groups[0]["lr"])
    if name in FINE_TUNED:
        assert rates == pytest.approx([1e-5] * 30)
    else:
        assert rates[:3] == pytest.approx([1e-6, 1e-6 + 0.999e-3 / 5, 1e-6 + 2 * 0.999e-3 / 5])
        assert rates[150] == pytest.approx((1e-3 + 1e-5) / 2)
        assert (len(rates), rates[299]) == (300, pytest.approx(1e-5, rel=0.01))


@pytest.mark.parametrize("name", FINE_TUNED)
def test_fine_tuning_starts_from_the_checkpoint_given(name, tmp_path):
    trained = write_checkpoint(tmp_path / "a.pth", img_size=224)
    model = build_model(load(name, {**SMALL, "model.pretrained_cfg_overlay.file": str(tmp_path / "a.pth")}).model)
    assert (trained.pos_embed.shape, model.pos_embed.shape) == ((1, 197, 32), (1, 730, 32))
    assert torch.equal(model.pos_embed[0, 364], trained.pos_embed[0, 98])  # the class token's
    for key, value in trained.state_dict().items():
        assert key == "pos_embed" or torch.equal(model.state_dict()[key], value), key


@pytest.mark.parametrize("name", FINE_TUNED)
def test_fine_tuning_starts_by_default_from_what_is_trained_before(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = load(name, SMALL)
    before = recipe.model["pretrained_cfg_overlay"]["file"]
    assert before.removeprefix("work_dirs/").removesuffix("/best.pth") in PUBLISHED
    with pytest.raises(UserError, match=f"no such checkpoint: {re.escape(before)}"):
        build_model(recipe.model)


def test_the_two_models_compared_are_of_one_size():
    vim, deit = (build_model(load(f"{name}-nano_1xb64_mnist5k").model) for name in ("vim", "deit"))
    sizes = [sum(parameter.numel() for parameter in model.parameters()) for model in (vim, deit)]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.02)
    assert vim.patch_embed.num_patches == deit.patch_embed.num_patches == 49
