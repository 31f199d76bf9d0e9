"""From videos on disk to accuracies over views, with the smallest model."""

import csv
import re
import shutil
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator

from tests.engine.test_loop import assert_same, load
from tests.tiny import ROOT, run_of, write_image, write_lines
from vim.data import Share, part
from vim.engine.build import build_loader
from vim.engine.config import load_recipe, write_recipe
from vim.errors import UserError
from vim.options import ImageRecipe
from vim.tasks.classification.predict import Predictor
from vim.tasks.classification.views import Views, evaluate_views

CONFIG = "configs/videomamba/videomamba-test_digit-motion.py"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Three videos as folders of frames to train on, two held out and one that cannot be read."""
    root = tmp_path_factory.mktemp("videos")
    for name, labels in (("train", (0, 1, 0, 1)), ("val", (1, 0, 1))):
        for i in range(len(labels)):
            for frame in range(9):
                write_image(root / name / str(i) / f"{frame}.png", 40 + frame, 60)
        (root / f"{name}.csv").write_text("".join(f"{name}/{i},{label}\n" for i, label in enumerate(labels)))
    for frame in range(9):
        (root / f"val/2/{frame}.png").write_bytes(b"nothing")
    (root / "classes.txt").write_text("left\nright\n")
    return root


def recipe(root, **options):
    return load_recipe(
        ROOT / CONFIG,
        ImageRecipe,
        {
            "data.dataset": "videos",
            "data.root": str(root),
            "data.batch_size": 4,
            "data.num_workers": 0,
            "data.max_unreadable": 0.9,
            "data.samples": 2,
            "model.num_classes": 2,
            "model.in_chans": 3,
            "schedule.num_epochs": 1,
            "schedule.warmup_epochs": 0,
            "mixup.mixup_alpha": 0.8,
            "mixup.cutmix_alpha": 1.0,
            **{key.replace("__", "."): value for key, value in options.items()},
        },
    )


@pytest.fixture
def config(root):
    return recipe(root)


def test_it_trains_on_clips_and_goes_on_exactly(root, tmp_path):
    config = recipe(root, schedule__num_epochs=2, train__save_updates=1, train__keep=9)
    loop = run_of(config, tmp_path / "whole")
    assert loop.fit()
    assert loop.task.evaluation.images == 2
    assert len(loop.task.evaluation.unreadable) == 1
    run_of(config, tmp_path / "other", tmp_path / "whole/last.3.pth").fit()
    assert_same(load(tmp_path / "other/last.pth"), load(tmp_path / "whole/last.pth"))


def views_of(config, trainer, clips, crops, share=Share()):  # noqa: B008
    data = replace(config.data, video={**config.data.video, "num_clips": clips, "num_crops": crops})
    videos = part(data, "val", "RGB")
    return videos, build_loader(data, Views(videos), trainer.task.model, share, is_training=False)


class Sum(torch.nn.Module):
    """Logits that tell a clip from another."""

    def forward(self, clips):
        return torch.stack([clips.mean((1, 2, 3, 4)), clips[:, :, 0].std((1, 2, 3))], 1) * 5


@pytest.mark.parametrize(("clips", "crops"), [(1, 1), (2, 3)])
def test_probabilities_are_averaged_over_views(clips, crops, config, tmp_path):
    trainer = run_of(config, tmp_path)
    videos, loader = views_of(config, trainer, clips, crops)
    model = Sum()
    evaluation = evaluate_views(model, loader, Accelerator(), 2)
    transform = loader.dataset.transform
    means = [
        torch.stack([model(transform(videos[i][0])[None])[0].softmax(0) for i in range(first, first + clips * crops)])
        .double()
        .mean(0)
        for first in (0, clips * crops)
    ]
    assert evaluation.loss == pytest.approx(-float(means[0][1].log() + means[1][0].log()) / 2, rel=1e-5)
    assert evaluation.top1 == sum(int(mean.argmax()) == label for mean, label in zip(means, (1, 0), strict=True)) / 2
    assert evaluation.images == 2
    assert evaluation.unreadable


def test_processes_share_the_views_and_see_each_once(config, tmp_path):
    trainer = run_of(config, tmp_path)
    seen = []
    for rank in range(4):
        _, loader = views_of(config, trainer, 2, 3, Share(rank, 4))
        seen += [place for batch in loader for place in batch.labels.tolist() if place != -1]
    assert sorted(seen) == list(range(12))


def test_a_label_that_is_no_class(config, tmp_path):
    trainer = run_of(config, tmp_path)
    _, loader = views_of(config, trainer, 1, 1)
    with pytest.raises(UserError, match="a video is labelled 1: expected 0 to 0, the classes"):
        evaluate_views(Sum(), loader, Accelerator(), 1)


def test_a_video_that_several_lines_name_is_one(config, root, tmp_path):
    """Lines may repeat, and be windows of one video: its views are averaged together."""
    trainer = run_of(config, tmp_path)
    once = evaluate_views(Sum(), views_of(config, trainer, 2, 1)[1], Accelerator(), 2)
    text = (root / "val.csv").read_text()
    twice = tmp_path / "twice"
    twice.mkdir()
    (twice / "val.csv").write_text(text + text)
    (twice / "train.csv").write_text(text)
    other = recipe(twice, data__video__prefix=str(root))
    again = evaluate_views(Sum(), views_of(other, trainer, 2, 1)[1], Accelerator(), 2)
    assert again.images == once.images
    assert again.loss == pytest.approx(once.loss)


def test_videos_with_several_labels(root, tmp_path, call):
    """Probabilities of labels are averaged over views; a video that cannot be read counts nowhere."""
    shutil.copytree(root, tmp_path / "data")
    rows = [f"train/{i},{labels}" for i, labels in enumerate(("up", "up;left", "", "left"))]
    rows += ["val/0,up;left", "val/1,left", "val/2,up"]
    write_lines(tmp_path / "data/labels.csv", "file,labels", *rows)
    options = {"data__labels": "labels.csv", "data__sampling": "balanced", "train__class_weights": [1, 2]}
    config = recipe(tmp_path / "data", **options)
    trainer = run_of(config, tmp_path / "run")
    assert trainer.fit()
    assert (trainer.task.evaluation.images, len(trainer.task.evaluation.unreadable)) == (2, 1)

    videos, loader = views_of(config, trainer, 2, 3)
    found = evaluate_views(Sum(), loader, Accelerator(), 2)
    clips = [torch.stack([loader.dataset.transform(videos[i][0]) for i in range(first, first + 6)]) for first in (0, 6)]
    means = torch.stack([Sum()(views).double().sigmoid().mean(0) for views in clips])
    labels = torch.tensor([[1, 1], [1, 0]])  # left, up
    assert found.loss == pytest.approx(-float((labels * means + (1 - labels) * (1 - means)).log().mean()), rel=1e-5)
    assert found.average_precision.tolist() == pytest.approx([1, 1 if means[0, 1] > means[1, 1] else 1 / 2])

    words = ["--work-dir", tmp_path / "out", "--clips", 1, "--crops", 1]
    status, output, _ = call("test_video", tmp_path / "run/config.py", tmp_path / "run/best.pth", *words)
    assert status == 0
    assert re.fullmatch(r"mAP \d+\.\d\d % \(8x1x1 frames x crops x clips\)", output.splitlines()[-1])


def test_tools(config, root, tmp_path, call):
    run_of(config, tmp_path / "run").fit()
    best = tmp_path / "run/best.pth"
    config = tmp_path / "run/config.py"
    _, output, _ = call("test_video", config, best, "--work-dir", tmp_path / "out", "--clips", 2)
    assert "(8x3x2 frames x crops x clips)" in output.splitlines()[-1]
    with (tmp_path / "out/results.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert (row["views"], row["images"], row["img_size"]) == ("8x3x2", "2", "32")
    _, output, _ = call("predict", best, root / "val/0", root / "val/1", "--draw", tmp_path / "pictures")
    assert "left" in output
    assert len(list((tmp_path / "pictures").iterdir())) == 2


def test_published_weights_and_a_config_without_a_transform(config, root, tmp_path, call):
    trainer = run_of(config, tmp_path / "run")
    write_recipe(replace(config, data=replace(config.data, eval_transform={})), tmp_path / "config.py")
    torch.save({"model": trainer.task.model.state_dict()}, tmp_path / "a.pth")
    trainer.fit()
    call("test_video", tmp_path / "config.py", tmp_path / "run/best.pth", "--work-dir", tmp_path / "out")
    assert "32" in (tmp_path / "out/results.csv").read_text()


def test_a_broken_video_does_not_end_predictions(config, root, tmp_path, call):
    run_of(config, tmp_path / "run").fit()
    words = [root / "val/2", root / "val/0"]
    status, output, errors = call("predict", tmp_path / "run/best.pth", *words)
    assert status == 2
    assert errors.strip().splitlines()[-1].startswith(f"error: cannot read {root / 'val/2'}")
    assert "left" in output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 1}, "the data has 2 classes and the model 1: --cfg-options model.num_classes=2"),
        ({"num_frames": 4}, "data.video.num_frames is 8, and model.num_frames 4: make them equal"),
        ({"num_frames": None}, "the data are videos, and the model is for images"),
    ],
)
def test_data_of_another_kind(options, message, root, tmp_path):
    with pytest.raises(UserError, match=message):
        run_of(recipe(root, **{f"model__{key}": value for key, value in options.items()}), tmp_path)


def test_a_label_beyond_the_model(root, tmp_path):
    shutil.copytree(root, tmp_path / "data")
    (tmp_path / "data/classes.txt").unlink()
    config = recipe(tmp_path / "data", model__num_classes=1)
    message = "a video of train has label 1, and the model 1 classes: --cfg-options model.num_classes=2"
    with pytest.raises(UserError, match=message):
        run_of(config, tmp_path / "run")


def test_images_for_a_model_of_clips(root, tmp_path):
    config = recipe(root, data__dataset="digits", model__num_classes=10)
    with pytest.raises(UserError, match="the data are images, and the model is for clips of 8 frames"):
        run_of(config, tmp_path)


def test_a_folder_of_frames_is_read(root, config, tmp_path):
    trainer = run_of(config, tmp_path)
    frames = Predictor(trainer.task.model, {}, ["left", "right"]).read(root / "val/0")
    assert len(frames) == 8
