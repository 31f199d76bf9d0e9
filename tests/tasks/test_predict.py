import re

import pytest
import timm
import torch
from PIL import Image

import vim  # noqa: F401  registers the models
from tests.tiny import few_digits, run_of, tiny_recipe, write_image
from vim.errors import UserError
from vim.tasks.classification.predict import Predictor, draw


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    work_dir = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as monkeypatch:
        few_digits(monkeypatch)
        run_of(tiny_recipe(schedule__num_epochs=1), work_dir).fit()
    return work_dir / "best.pth"


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A file of the published layout."""
    path = tmp_path_factory.mktemp("published") / "weights.pth"
    torch.save({"model": timm.create_model("test_vim").state_dict()}, path)
    return path


def predict(predictor, path, **options):
    return predictor(predictor.read(path), **options)


def assert_sorted(predictions):
    probabilities = [probability for _, probability in predictions]
    assert probabilities == sorted(probabilities, reverse=True)
    assert all(0 <= probability <= 1 for probability in probabilities)
    assert sum(probabilities) <= 1 + 1e-6


@pytest.mark.parametrize("size", [(1, 1), (10, 12), (300, 20)], ids=str)
def test_the_likeliest_classes(size, checkpoint, tmp_path):
    predictions = predict(Predictor.from_checkpoint(checkpoint), write_image(tmp_path / "a.png", *size))
    assert len({name for name, _ in predictions}) == 5
    assert {name for name, _ in predictions} <= set("0123456789")
    assert_sorted(predictions)


def test_all_classes_sum_to_one(checkpoint, tmp_path):
    predictions = predict(Predictor.from_checkpoint(checkpoint), write_image(tmp_path / "a.png"), top_k=100)
    assert sorted(name for name, _ in predictions) == list("0123456789")
    assert sum(probability for _, probability in predictions) == pytest.approx(1, abs=1e-5)


def test_names_of_imagenet(published, tmp_path):
    predictor = Predictor.from_pretrained("test_vim", published)
    assert len(predictor.classes) == 1000
    assert predictor.classes[0].startswith("tench")
    predictions = predict(predictor, write_image(tmp_path / "a.png"))
    assert len(predictions) == 5
    assert_sorted(predictions)


def test_draw(tmp_path):
    with Image.open(write_image(tmp_path / "a.png")) as image:
        draw([image] * 3, [("tench, Tinca tinca", 0.7), ("$\\frac$", 0.2), ("\ud800$", 0.1)], tmp_path / "out.png")
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.size == (800, 300)


def test_published_weights_without_their_model(published):
    with pytest.raises(UserError, match=re.escape(f"{published} is not a checkpoint") + ".*with --model NAME"):
        Predictor.from_checkpoint(published)


def test_published_weights_that_do_not_fit(published, checkpoint, tmp_path):
    with pytest.raises(UserError, match=re.escape(f"no such checkpoint: {tmp_path / 'a.pth'}")):
        Predictor.from_pretrained("test_vim", tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"no such model: vim_nothing \(the closest: vim_tiny"):
        Predictor.from_pretrained("vim_nothing", published)
    with pytest.raises(UserError, match="resnet18 is timm's: expected a model of this package"):
        Predictor.from_pretrained("resnet18", published)
    with pytest.raises(UserError, match=re.escape(f"{checkpoint} is of another model: cls_token is (1, 1, 16) there")):
        Predictor.from_pretrained("test_vim", checkpoint)
    damaged = tmp_path / "damaged.pth"
    damaged.write_bytes(published.read_bytes()[:5000])
    with pytest.raises(UserError, match=re.escape(f"cannot read {damaged} as a checkpoint: ")):
        Predictor.from_pretrained("test_vim", damaged)


def test_a_checkpoint_whose_model_cannot_be_built(checkpoint, tmp_path):
    state = torch.load(checkpoint, weights_only=True)
    state["meta"]["model"]["patch_size"] = 0
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(UserError, match="a.pth names a model that cannot be built: "):
        Predictor.from_checkpoint(tmp_path / "a.pth")


def test_a_name_for_every_class():
    with pytest.raises(UserError, match="the model has 1000 classes, and there are names for 2"):
        Predictor(timm.create_model("test_vim"), {}, ["cat", "dog"])
