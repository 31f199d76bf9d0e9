import argparse
import ast
import re
from typing import NamedTuple

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2

from tests.tiny import ROOT, FewDigits, write_folder
from vim.data import train_transform
from vim.data.datasets import BUILT_IN
from vim.engine.config import add_config_arguments, load_config
from vim.engine.trainer import Trainer, build_model
from vim.errors import UserError

CONFIGS = {
    path.stem: path
    for path in sorted((ROOT / "configs").glob("[!_]*/*.py"))
    if "video" not in path.stem and path.parent.name != "tsm2"
}


class Facts(NamedTuple):
    """Of the published training scripts; lr is that of 512 images a step, top1 the README's."""

    lr: float
    weight_decay: float
    drop_path: float
    epochs: int
    warmup_lr: float
    top1: str


FACTS = {
    "vim-tiny_8xb128-300e_in1k": Facts(5e-4, 0.1, 0.0, 300, 1e-6, "76.1"),
    "vim-small_8xb64-300e_in1k": Facts(1e-3, 0.05, 0.05, 300, 1e-6, "80.5"),
    "vim-base_8xb64-300e_in1k": Facts(1e-3, 0.05, 0.1, 300, 1e-6, "81.9"),  # there is no script: ours
    "vim-tiny-stride8_8xb128-30e_in1k": Facts(5e-6, 1e-8, 0.0, 30, 1e-5, "78.3"),
    "vim-small-stride8_8xb128-30e_in1k": Facts(5e-6, 1e-8, 0.0, 30, 1e-5, "81.6"),
}
FINE_TUNED = [name for name in CONFIGS if "stride8" in name]
SMALL = {"model.embed_dim": 16, "model.depth": 2}
# of stages; the last has four tokens, without which its A would get no gradient
SMALL_STAGES = {f"model.{key}": [number] * 4 for key, number in (("embed_dims", 8), ("channel_dims", 8), ("depths", 1))}


class Eight(FewDigits):
    """One batch."""

    def __init__(self, **options):
        super().__init__(**options)
        self.images, self.labels = self.images[:8], self.labels[:8]


def gpus_and_batch(name):
    """What a config's name says: 8xb128 is 8 GPUs with 128 images each."""
    return map(int, re.search(r"_(\d+)xb(\d+)[-_]", name).groups())


def write_checkpoint(path, img_size):
    """Of the model before fine-tuning, as small as in the tests."""
    model = timm.create_model("vim_tiny", img_size=img_size, num_classes=1000, embed_dim=16, depth=2)
    torch.save({"model": model.state_dict(), "epoch": 299}, path)
    return model


def load(name, words):
    parser = argparse.ArgumentParser()
    add_config_arguments(parser)
    return load_config(CONFIGS[name], parser.parse_args(["", "--cfg-options", *words]).cfg_options)


@pytest.mark.parametrize("name", CONFIGS)
def test_it_trains(name, tmp_path, monkeypatch):
    for built_in in BUILT_IN:
        monkeypatch.setitem(BUILT_IN, built_in, Eight)
    for plot in ("plot_curves", "plot_confusion"):
        monkeypatch.setattr(f"vim.engine.trainer.{plot}", lambda *args: None)
    small = {**SMALL_STAGES, "model.img_size": 64} if name.startswith("vim2") else {**SMALL, "model.img_size": 32}
    options = {**small, "data.batch_size": 8, "data.num_workers": 0, "schedule.num_epochs": 1}
    config = load_config(CONFIGS[name], {**options, "schedule.warmup_epochs": 0})
    if config.data.dataset == "folder":
        config.data.root, config.model.num_classes = str(write_folder(tmp_path / "data")), 2
    if config.model.get("pretrained"):
        config.model.pretrained_cfg_overlay.file = str(tmp_path / "a.pth")
        write_checkpoint(tmp_path / "a.pth", img_size=32)
    trainer = Trainer(config, tmp_path / "run")
    assert trainer.updates == 1
    before = {key: value.clone() for key, value in trainer.bare_model.named_parameters()}
    assert trainer.fit().confusion.sum() == 8
    assert trainer.rows[0]["train_loss"] > 0
    assert not [key for key, value in trainer.bare_model.named_parameters() if torch.equal(value, before[key])]


@pytest.mark.parametrize("name", CONFIGS)
def test_its_docstring(name):
    text = " ".join(ast.get_docstring(ast.parse(CONFIGS[name].read_text())).split())
    gpus, batch = gpus_and_batch(name)
    start = "python" if gpus == 1 else f"torchrun --nproc-per-node {gpus}"
    assert "Paper: https://arxiv.org/abs/" in text
    assert "Hardware: " in text
    assert f"Command: {start} tools/train.py {CONFIGS[name].relative_to(ROOT)}" in text
    assert f"Accuracy: {FACTS[name].top1} % top-1 published" if name in FACTS else "Accuracy: " in text
    assert load_config(CONFIGS[name]).data.batch_size == batch


def test_every_recipe_for_imagenet_is_compared_with_the_facts():
    assert set(FACTS) == {name for name in CONFIGS if name.startswith("vim-") and name.endswith("in1k")}


@pytest.mark.parametrize("name", FACTS)
def test_the_published_recipe(name):
    config, facts = load_config(CONFIGS[name]), FACTS[name]
    gpus, batch = gpus_and_batch(name)
    assert config.model.get("drop_path_rate", 0.0) == facts.drop_path
    assert config.optimizer == {
        "opt": "adamw",
        "lr": pytest.approx(facts.lr * gpus * batch / 512),
        "weight_decay": facts.weight_decay,
    }
    assert config.schedule == {
        "sched": "cosine",
        "num_epochs": facts.epochs,
        "warmup_epochs": 5,
        "warmup_lr": facts.warmup_lr,
        "min_lr": 1e-5,
        "step_on_epochs": True,
    }
    assert config.train == {"seed": 0, "amp": "no", "smoothing": 0.1, "ema_decay": 0.99996}
    assert config.data.repeats == 3
    assert config.data.train_transform == {
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
    assert config.mixup == mixup


@pytest.mark.parametrize("name", FACTS)
def test_the_optimizer_and_the_transform_that_come_of_it(name):
    config = load_config(CONFIGS[name], {**SMALL, "model.pretrained": False})
    model = build_model(config.model)
    optimizer = create_optimizer_v2(model, **config.optimizer)
    assert {(group["betas"], group["eps"]) for group in optimizer.param_groups} == {((0.9, 0.999), 1e-8)}
    decayed = next(group for group in optimizer.param_groups if group["weight_decay"])
    assert decayed["weight_decay"] == FACTS[name].weight_decay
    assert any(parameter is model.layers[0].mixer.A_log for parameter in decayed["params"])
    steps = [type(step).__name__ for step in train_transform(model, config.data.train_transform).transforms]
    assert steps == [
        "RandomResizedCropAndInterpolation",
        "RandomHorizontalFlip",
        "RandAugment",
        "MaybeToTensor",
        "Normalize",
        "RandomErasing",
    ]


@pytest.mark.parametrize("name", FACTS)
def test_the_learning_rate_of_each_epoch(name):
    config, facts = load_config(CONFIGS[name]), FACTS[name]
    optimizer = create_optimizer_v2(torch.nn.Linear(1, 1), **config.optimizer)
    scheduler, num_epochs = create_scheduler_v2(optimizer, **config.schedule)
    assert num_epochs == facts.epochs
    rates = []
    for epoch in range(num_epochs):
        scheduler.step(epoch)
        rates.append(optimizer.param_groups[0]["lr"])
    if name in FINE_TUNED:
        assert rates == pytest.approx([1e-5] * 30)
    else:
        assert rates[:3] == pytest.approx([1e-6, 1e-6 + 0.999e-3 / 5, 1e-6 + 2 * 0.999e-3 / 5])
        assert rates[150] == pytest.approx((1e-3 + 1e-5) / 2)
        assert rates[299] == pytest.approx(1e-5, rel=0.01)


@pytest.mark.parametrize("name", FINE_TUNED)
def test_fine_tuning_starts_from_the_checkpoint_given(name, tmp_path):
    trained = write_checkpoint(tmp_path / "a.pth", img_size=224)
    words = [f"{key}={value}" for key, value in SMALL.items()]
    config = load(name, [*words, f"model.pretrained_cfg_overlay.file={tmp_path / 'a.pth'}"])
    model = build_model(config.model)
    assert (trained.pos_embed.shape, model.pos_embed.shape) == ((1, 197, 16), (1, 730, 16))
    assert torch.equal(model.pos_embed[0, 364], trained.pos_embed[0, 98])  # the class token's
    for key, value in trained.state_dict().items():
        assert key == "pos_embed" or torch.equal(model.state_dict()[key], value), key


@pytest.mark.parametrize("name", FINE_TUNED)
def test_fine_tuning_starts_by_default_from_what_is_trained_before(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_config(CONFIGS[name], SMALL)
    before = config.model.pretrained_cfg_overlay.file
    assert before.removeprefix("work_dirs/").removesuffix("/best.pth") in FACTS
    with pytest.raises(UserError, match=f"no such checkpoint: {re.escape(before)}"):
        build_model(config.model)


def test_the_two_models_compared_are_of_one_size():
    vim, deit = (build_model(load_config(CONFIGS[f"{name}-nano_1xb64_mnist5k"]).model) for name in ("vim", "deit"))
    sizes = [sum(parameter.numel() for parameter in model.parameters()) for model in (vim, deit)]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.02)
    assert vim.patch_embed.num_patches == deit.patch_embed.num_patches == 49
