"""Images that may have several labels: figures by other definitions, and from files to predictions."""

import csv
import math
import re

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image, ImageDraw
from sklearn.metrics import average_precision_score, f1_score, precision_score, recall_score

from tests.engine.test_loop import assert_same, load
from tests.engine.test_processes import run
from tests.tiny import FOLDER, OPTIONS, run_of
from vim.data import Share, create_loader
from vim.engine.config import load_recipe
from vim.errors import UserError
from vim.options import ImageRecipe
from vim.tasks.classification.candidates import load_candidate
from vim.tasks.classification.evaluate import evaluate_several
from vim.tasks.classification.multilabel import Scores, average_precision, best_threshold
from vim.tasks.classification.predict import Predictor
from vim.tasks.classification.train import plot_run

NAMES = ["blue", "lime", "red", "white"]  # the last one is a rare one


# figures


def drawn(seed, count, classes=4):
    """Scores with ties, and labels, of which a few are not known."""
    generator = np.random.default_rng(seed)
    scores = generator.integers(1, 30, (count, classes)) / 30
    labels = (generator.random((count, classes)) < 0.3 * scores + 0.1).astype(int)
    return scores, np.where(generator.random((count, classes)) < 0.1, -1, labels)


def evaluation_of(scores, labels, thresholds=None):
    tally = Scores(scores.shape[1], thresholds)
    for part in np.array_split(np.arange(len(scores)), 3):
        tally.add(torch.tensor(scores[part]).logit(), torch.tensor(labels[part], dtype=torch.int8))
    return tally.evaluation([])


def test_average_precision_by_hand():
    scores, positive = torch.tensor([0.9, 0.8, 0.8, 0.3, 0.1]), torch.tensor([True, False, True, False, True])
    # recall 1/3 with precision 1/1; 2/3 with 2/3, both of the tie; 3/3 with 3/5
    assert average_precision(scores, positive) == pytest.approx((1 + 2 / 3 + 3 / 5) / 3)
    assert average_precision(scores, ~positive) == pytest.approx((1 / 3 + 2 / 4) / 2)
    assert math.isnan(average_precision(scores, torch.zeros(5, dtype=torch.bool)))


def test_the_threshold_with_the_best_f1():
    scores = torch.tensor([0.9, 0.8, 0.6, 0.3])
    assert best_threshold(scores, torch.tensor([True, False, True, False])) == pytest.approx(0.45)
    assert best_threshold(scores, torch.tensor([True, False, False, False])) == pytest.approx(0.85)
    assert best_threshold(scores, torch.ones(4, dtype=torch.bool)) == pytest.approx(0.15)
    assert best_threshold(scores, torch.zeros(4, dtype=torch.bool)) == 0.5


@pytest.mark.parametrize("seed", range(5))
def test_the_figures_are_those_of_scikit_learn(seed):
    scores, labels = drawn(seed, 80)
    found = evaluation_of(scores, labels)
    known = labels >= 0
    pairs = [(labels[known[:, i], i], scores[known[:, i], i]) for i in range(4)]
    precisions = [average_precision_score(*pair) for pair in pairs]
    assert found.average_precision.tolist() == pytest.approx(precisions, rel=1e-12)
    figures = found.figures
    assert figures["map"] == pytest.approx(np.mean(precisions))
    losses = [-np.mean(np.log(np.where(y == 1, p, 1 - p))) * len(y) for y, p in pairs]
    assert figures["loss"] == pytest.approx(sum(losses) / known.sum())
    for suffix, thresholds in (("", [0.5] * 4), ("_tuned", found.thresholds.tolist())):
        guesses = [p >= t for (_, p), t in zip(pairs, thresholds, strict=True)]
        scored = [f1_score(y, guess) for (y, _), guess in zip(pairs, guesses, strict=True)]
        assert figures[f"f1_macro{suffix}"] == pytest.approx(np.mean(scored))
        flat = [np.concatenate(parts) for parts in ([y for y, _ in pairs], guesses)]
        assert figures[f"f1_micro{suffix}"] == pytest.approx(f1_score(*flat))
    counts = found.at_thresholds  # with the guesses of the last round
    zipped = list(zip(pairs, guesses, strict=True))
    assert counts.precision().tolist() == pytest.approx([precision_score(y, guess) for (y, _), guess in zipped])
    assert counts.recall().tolist() == pytest.approx([recall_score(y, guess) for (y, _), guess in zipped])
    best = [max(f1_score(y, p >= t) for t in set(p)) for y, p in pairs]
    assert found.at_thresholds.f1().tolist() == pytest.approx(best)
    assert found.images == known.any(1).sum()


def test_thresholds_that_are_given():
    scores, labels = drawn(0, 40)
    found = evaluation_of(scores, labels, [0.5] * 4)
    assert found.thresholds.tolist() == [0.5] * 4
    assert found.figures["f1_micro"] == found.figures["f1_micro_tuned"]


def test_a_class_that_no_image_has():
    scores, labels = drawn(0, 40)
    labels[:, 1] = np.minimum(labels[:, 1], 0)
    found = evaluation_of(scores, labels)
    rest = evaluation_of(scores[:, [0, 2, 3]], labels[:, [0, 2, 3]])
    for name in ("map", "f1_macro", "f1_macro_tuned"):
        assert found.figures[name] == pytest.approx(rest.figures[name])
    assert found.summary[-1].endswith("% of the classes; 1 that no image has are left out")
    labels = np.minimum(labels, 0)
    with pytest.raises(UserError, match="no image was evaluated that has a label: there are 40"):
        evaluation_of(scores, labels)


class Rows:
    """Logits as images; some cannot be read."""

    def __init__(self, scores, labels, broken=()):
        self.logits, self.labels = torch.tensor(scores).logit().float(), torch.tensor(labels, dtype=torch.int8)
        self.ignored, self.broken = torch.full_like(self.labels[0], -1), broken

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        if index in self.broken:
            raise UserError(f"image {index} is broken")
        return self.logits[index], self.labels[index]


def loader_of(dataset, share=Share()):  # noqa: B008
    return create_loader(
        dataset, lambda item: item, batch_size=4, num_workers=0, seed=0, share=share, is_training=False
    )


def test_padding_and_broken_images_count_nowhere():
    scores, labels = drawn(1, 23)
    broken = [4, 5, 6, 7, 22]  # a whole batch, and one of the last, padded batch
    rest = np.setdiff1d(np.arange(23), broken)
    whole = evaluation_of(scores[rest], labels[rest])
    dataset = Rows(scores, labels, broken)
    found = evaluate_several(torch.nn.Identity(), loader_of(dataset), Accelerator(), 4)
    assert found.figures == pytest.approx(whole.figures, rel=1e-5)
    assert (found.images, len(found.unreadable)) == (whole.images, 5)


def test_processes_share_the_images_and_see_each_once(monkeypatch):
    scores, labels = drawn(1, 23)
    dataset, own = Rows(scores, labels), []

    def gather(objects):  # what accelerate does over processes
        own.append(objects)
        return [one for objects in own for one in objects] if isinstance(objects[0], tuple) else objects

    monkeypatch.setattr("vim.tasks.classification.multilabel.gather_object", gather)
    for rank in range(2):
        found = evaluate_several(torch.nn.Identity(), loader_of(dataset, Share(rank, 2)), Accelerator(), 4)
    assert found.images == 23
    assert found.figures == pytest.approx(evaluation_of(scores, labels).figures, rel=1e-5)


# from files to predictions


def paint(path, names, seed):
    """A dark picture with a square of each colour, each in a quarter of its own."""
    quarters = np.random.default_rng(seed).permutation(4).tolist()
    picture = Image.new("RGB", (32, 32), (20, 20, 20))
    for name, quarter in zip(names, quarters, strict=False):
        left, top = 16 * (quarter % 2), 16 * (quarter // 2)
        ImageDraw.Draw(picture).rectangle((left + 1, top + 1, left + 14, top + 14), name)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """96 images to train on and 48 held out, with a column for each colour; some cells are empty."""
    root = tmp_path_factory.mktemp("shapes")
    generator = np.random.default_rng(0)
    rows = []
    for part, count in (("train", 96), ("val", 48)):
        for i in range(count):
            has = generator.random(4) < [0.4, 0.4, 0.4, 0.15]
            paint(root / f"{part}/{i}.png", [name for name, own in zip(NAMES, has, strict=True) if own], (i, count))
            cells = ["" if generator.random() < 0.05 else str(int(own)) for own in has]
            rows.append(",".join([f"{part}/{i}.png", *cells]))
    (root / "labels.csv").write_text("\n".join([",".join(["file", *NAMES]), *rows]) + "\n")
    return root


def recipe(root, **options):
    options = {key.replace("__", "."): value for key, value in options.items()}
    plain = {"scale": (0.9, 1.0), "hflip": 0.5, "color_jitter": 0.0, "auto_augment": None, "re_prob": 0.0}
    return load_recipe(
        FOLDER,
        ImageRecipe,
        {
            **OPTIONS,
            "model.img_size": 32,
            "model.patch_size": 8,
            "model.num_classes": 4,
            "data.root": str(root),
            "data.labels": "labels.csv",
            "data.num_workers": 0,
            "data.train_transform": plain,
            "data.eval_transform.crop_pct": 1.0,
            "model.depth": 1,
            "optimizer.lr": 0.01,
            **options,
        },
    )


BALANCED = {
    "data__sampling": "balanced",
    "train__class_weights": "balanced",
    "train__smoothing": 0.1,
    "mixup__mixup_alpha": 0.2,
    "train__save_updates": 4,  # of 6 an epoch
    "train__keep": 3,
}


@pytest.fixture(scope="module")
def trained(root, tmp_path_factory):
    work_dir = tmp_path_factory.mktemp("run")
    loop = run_of(recipe(root, data__samples=4, schedule__num_epochs=6), work_dir)
    assert loop.fit()
    return work_dir, loop


def test_training_finds_the_labels(trained):
    work_dir, loop = trained
    assert loop.rows[-1]["map"] > 0.9 > loop.rows[0]["map"]
    assert list(loop.rows[0])[3:] == ["loss", "map", "f1_micro", "f1_macro", "f1_micro_tuned", "f1_macro_tuned"]
    best, last = (load(work_dir / name) for name in ("best.pth", "last.pth"))
    assert best["training"]["rows"][-1]["map"] == max(row["map"] for row in loop.rows)
    assert last["meta"]["task"] == "multilabel"
    assert last["meta"]["thresholds"] == loop.task.evaluation.thresholds.tolist()
    plot_run(loop.task, loop)
    assert [path.name for path in work_dir.glob("*.png")] == ["curves.png"]


def test_it_goes_on_exactly(root, tmp_path):
    """From the middle of an epoch; until the next evaluation the thresholds are those of the last one."""
    loop = run_of(recipe(root, **BALANCED), tmp_path / "whole")
    assert loop.fit()
    middle = tmp_path / "whole/last.2.pth"
    assert load(middle)["training"]["position"]["update"] == 4
    resumed = run_of(recipe(root, **BALANCED), tmp_path / "other", middle)
    assert resumed.task.thresholds == load(middle)["meta"]["thresholds"] != [0.5] * 4
    assert resumed.fit()
    assert_same(load(tmp_path / "other/last.pth"), load(tmp_path / "whole/last.pth"))
    assert resumed.rows == loop.rows
    with pytest.raises(UserError, match="whose order follows from data.sampling: it was balanced"):
        run_of(recipe(root), tmp_path, middle)


def test_predictions(trained, tmp_path):
    predictor = Predictor.from_checkpoint(trained[0] / "last.pth")
    wrong = 0
    for seed, names in enumerate((["red"], ["lime", "blue"], ["blue", "red"], ["lime"])):
        paint(tmp_path / "a.png", names, (seed, 7))
        found = predictor(predictor.read(tmp_path / "a.png"))
        assert all(probability >= predictor.thresholds[NAMES.index(name)] for name, probability in found)
        wrong += len({name for name, _ in found} ^ set(names))
    assert wrong <= 2  # of 16
    assert len(predictor(predictor.read(tmp_path / "a.png"), top_k=3)) == 3


def test_a_checkpoint_that_lacks_a_threshold(trained, tmp_path):
    state = load(trained[0] / "last.pth")
    state["meta"]["thresholds"].pop()
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(UserError, match="a.pth is of 4 classes, and its thresholds are of others"):
        Predictor.from_checkpoint(tmp_path / "a.pth")
    with pytest.raises(UserError, match="a.pth is of 4 classes, and its thresholds are of others"):
        load_candidate(tmp_path / "a.pth")


def test_the_tools(trained, root, call, tmp_path):
    work_dir, loop = trained
    config, best = work_dir / "config.py", work_dir / "last.pth"
    status, output, errors = call("test", config, best, "--work-dir", tmp_path / "out")
    assert (status, errors) == (0, "")
    assert output.splitlines()[-1] == f"mAP {100 * loop.rows[-1]['map']:.2f} %"
    with (tmp_path / "out/results.csv").open() as file:
        (row,) = csv.DictReader(file)
    for name, value in loop.task.evaluation.figures.items():
        assert float(row[name]) == pytest.approx(value, rel=1e-6)
    with (tmp_path / "out/classes_test.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["class", "count", "ap", "threshold", "precision", "recall"]
    assert [row["class"] for row in rows] == NAMES
    assert np.mean([float(row["ap"]) for row in rows]) == pytest.approx(loop.rows[-1]["map"])
    assert not (tmp_path / "out/confusion_test.png").exists()
    paint(tmp_path / "none.png", [], 0)
    status, output, errors = call("predict", best, tmp_path / "none.png", root / "val/0.png", "--draw", tmp_path / "a")
    assert (status, errors) == (0, "")
    assert output.splitlines()[1] == "  no label"
    assert len(list((tmp_path / "a").iterdir())) == 2


def test_data_with_one_class_an_image(trained, root, call, tmp_path):
    lines = [line.split(",")[0] for line in (root / "labels.csv").read_text().splitlines()[1:]]
    rows = [f"{name},{NAMES[i % 4]}" for i, name in enumerate(lines)]
    single = root / "single.csv"
    single.write_text("\n".join(["file,label", *rows]) + "\n")
    status, _, errors = call(
        "test",
        trained[0] / "config.py",
        trained[0] / "last.pth",
        "--work-dir",
        tmp_path,
        "--cfg-options",
        "data.labels=single.csv",
    )
    assert status == 2
    assert "was trained on images with any number of labels each, and the config's data has one class" in errors
    with pytest.raises(UserError, match="was trained with another kind of labels: it was several an image"):
        run_of(recipe(root, data__labels="single.csv"), tmp_path / "run", trained[0] / "last.pth")
    loop = run_of(recipe(root, data__labels="single.csv", schedule__num_epochs=1), tmp_path / "other")
    assert loop.fit()
    assert loop.task.evaluation.images == 48


def test_labels_of_which_none_is_held_out(root, tmp_path):
    text = (root / "labels.csv").read_text().splitlines()
    held_out = [f"{line.split(',')[0]},0,0,0," for line in text if line.startswith("val/")]
    (root / "none.csv").write_text("\n".join([*(line for line in text if not line.startswith("val/")), *held_out]))
    with pytest.raises(UserError, match="no image or video of val has a label that is 1"):
        run_of(recipe(root, data__labels="none.csv"), tmp_path)


def test_two_processes_find_what_one_does(root, tmp_path):
    lines = (root / "labels.csv").read_text().splitlines()
    known = [re.sub(",(?=,|$)", ",0", line) for line in lines]  # each process averages over what it knows
    (root / "known.csv").write_text("\n".join(known))
    options = {"dataset": "folder", "root": str(root), "labels": "known.csv", "sampling": "balanced"}
    options = {f"data__{name}": value for name, value in options.items()} | {"schedule__num_epochs": 1}
    options |= {
        "model__in_chans": 3,
        "model__img_size": 32,
        "model__num_classes": 4,
        "train__class_weights": "balanced",
    }
    (one,), (two,) = (run(n, tmp_path / str(n), **options, data__batch_size=32 // n) for n in (1, 2))
    for name in ("train_loss", "loss", "map", "f1_micro_tuned"):
        assert two[name] == pytest.approx(one[name], rel=2e-4), name
