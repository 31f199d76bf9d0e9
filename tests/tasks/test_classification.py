"""Training of classifiers: what a run writes, and models of timm's own."""

import shutil
from dataclasses import replace

import pytest
import timm
import torch
from PIL import Image

from tests.tiny import FewDigits, few_digits, run_of, tiny_recipe
from vim.data.datasets import BUILT_IN
from vim.engine.weights import load_trained, save_for_timm
from vim.errors import UserError
from vim.tasks.classification.losses import divergence
from vim.tasks.classification.train import plot_run


@pytest.fixture(autouse=True)
def short(monkeypatch):
    few_digits(monkeypatch)


def test_the_pictures_of_a_run(tmp_path):
    loop = run_of(tiny_recipe(schedule__num_epochs=1), tmp_path)
    assert loop.fit()
    plot_run(loop.task, loop)
    for name in ("confusion.png", "curves.png"):
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 100


@pytest.mark.parametrize(("name", "size"), [("resnet10t", 32), ("test_vit", 160), ("test_convnext", 160)])
def test_models_of_timm_train(name, size, tmp_path):
    """Convolutional ones too, which have no patch embedding; in grey, as the digits are."""
    options = {"img_size": size} if "vit" in name else {}
    recipe = tiny_recipe(data__batch_size=32, schedule__num_epochs=1)
    model = {"model_name": name, "in_chans": 1, "num_classes": 10, **options}
    loop = run_of(replace(recipe, model=model), tmp_path)
    before = loop.task.model.get_classifier().weight.clone()
    assert loop.fit()
    assert (loop.task.model.get_classifier().weight != before).any()
    assert loop.task.evaluation.images == 64
    saved, state = load_trained(tmp_path / "best.pth")
    assert torch.equal(saved.get_classifier().weight, loop.task.model.get_classifier().weight)
    assert state["meta"]["classes"] == list("0123456789")
    assert run_of(replace(recipe, model=model), tmp_path, tmp_path / "last.pth").at.epoch == 1


def test_a_model_of_a_folder_is_kept_by_its_registered_name(tmp_path):
    """Its options and what prepares its images come from the folder, which need not be there later."""
    model = timm.create_model("test_vim", num_classes=10, in_chans=1, img_size=16, patch_size=4, embed_dim=16, depth=2)
    save_for_timm(model, tmp_path / "folder", None, {"crop_pct": 1.0, "mean": (0.25,), "std": (0.5,)})
    section = {"model_name": f"local-dir:{tmp_path / 'folder'}", "pretrained": True}
    run_of(replace(tiny_recipe(schedule__num_epochs=1), model=section), tmp_path / "run").fit()
    shutil.rmtree(tmp_path / "folder")
    _, state = load_trained(tmp_path / "run/best.pth")
    assert state["meta"]["model"]["model_name"] == "test_vim"
    assert (state["meta"]["model"]["depth"], state["meta"]["model"]["num_classes"]) == (2, 10)
    assert state["meta"]["eval_transform"]["mean"] == [0.25]


def test_what_the_running_average_teaches(tmp_path):
    """The weighted divergence of its logits is added to the loss, and it gets no gradient."""
    task = run_of(tiny_recipe(train__ema_decay=0.9, train__mesa=0.5), tmp_path).task
    average = timm.create_model(**{**task.recipe.model, "depth": 1}).eval()
    batch = next(task.batches(0, 0))
    task.model.eval()
    alone, both = task.loss(task.model, batch, None), task.loss(task.model, batch, average)
    both.backward()
    added = 0.5 * divergence(task.model(batch.images), average(batch.images))
    assert (both - alone).item() == pytest.approx(added.item(), rel=1e-4)
    assert all(parameter.grad is None for parameter in average.parameters())


class Broken(FewDigits):
    """64 images to train on, of which the first four cannot be read."""

    def __getitem__(self, index):
        if self.train and index < 4:
            raise UserError(f"image {index} is broken")
        return super().__getitem__(index)


@pytest.mark.parametrize(("most", "ends"), [(4 / 64, False), (3.9 / 64, True)])
def test_as_many_unreadable_images_as_allowed_do_not_end_a_run(most, ends, tmp_path, monkeypatch):
    monkeypatch.setitem(BUILT_IN, "digits", Broken)
    loop = run_of(tiny_recipe(schedule__num_epochs=1, data__max_unreadable=most), tmp_path)
    if ends:
        with pytest.raises(UserError, match="4 of 64 images cannot be read, more than data.max_unreadable .6.09%."):
            loop.fit()
    else:
        assert loop.fit()
    lines = (tmp_path / "unreadable.txt").read_text().splitlines()
    assert sorted(lines) == [f"image {index} is broken" for index in range(4)]
