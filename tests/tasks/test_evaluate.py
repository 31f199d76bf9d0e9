import copy
import csv
import errno
import math
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from accelerate import Accelerator
from PIL import Image
from timm.data import ImageNetInfo, RealLabelsImagenet

import vim  # noqa: F401  registers the models
from tests.tiny import few_digits, run_of, tiny_recipe, write_folder, write_truncated
from vim.data import Share, create_loader
from vim.engine.build import build_loader
from vim.engine.files import appending
from vim.errors import UserError
from vim.options import ImageData
from vim.tasks.classification.candidates import Candidate, for_size, load_candidate, resized
from vim.tasks.classification.evaluate import Evaluation, evaluate, evaluate_timed
from vim.tasks.classification.imagenet import HeldOut, held_out
from vim.tasks.classification.results import (
    Result,
    append_result,
    columns,
    image_size,
    open_results,
    plot_sizes,
    write_evaluation,
)

SYNSETS = ImageNetInfo().label_names()
CLASSES = 7
WHOLE = Share()


class Samples:
    """Random images and labels; some images cannot be read."""

    def __init__(self, count, broken=()):
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(count, 3, 32, 32, generator=generator)
        self.labels = torch.randint(CLASSES - 1, (count,), generator=generator).tolist()  # the last class has none
        self.broken = broken

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        if index in self.broken:
            raise UserError(f"image {index} is broken")
        return self.images[index], self.labels[index]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = timm.create_model("test_vim", img_size=32, num_classes=CLASSES, embed_dim=16, depth=1).eval()
    torch.nn.init.normal_(model.head.weight)  # predictions differ
    return model


def load(dataset, transform=lambda image: image, batch_size=4, share=WHOLE):
    return create_loader(
        dataset, transform, batch_size=batch_size, num_workers=0, seed=0, share=share, is_training=False
    )


def expected(model, samples):
    """Loss, top-1, top-5 and the confusion, image by image in float64."""
    losses, ranks, confusion = [], [], np.zeros((CLASSES, CLASSES), int)
    for index, label in enumerate(samples.labels):
        if index in samples.broken:
            continue
        with torch.no_grad():
            logits = model(samples.images[index : index + 1])[0].double().numpy()
        losses.append(math.log(np.exp(logits).sum()) - logits[label])
        ranks.append(int((logits > logits[label]).sum()))
        confusion[label, logits.argmax()] += 1
    return np.mean(losses), np.mean([r == 0 for r in ranks]), np.mean([r < 5 for r in ranks]), confusion


@pytest.mark.parametrize("broken", [(), (0, 4, 5, 6, 7, 21)], ids=["whole", "broken"])
def test_the_figures(model, broken):
    samples = Samples(22, broken)  # the last batch is padded, with 4 to 7 one is all broken
    loss, top1, top5, confusion = expected(model, samples)
    evaluation = evaluate(model, load(samples), Accelerator(), CLASSES)
    assert evaluation.loss == pytest.approx(loss, rel=1e-5)
    assert (evaluation.top1, evaluation.top5) == pytest.approx((top1, top5))
    assert 0 < top1 < top5 < 1
    assert evaluation.confusion.tolist() == confusion.tolist()
    assert evaluation.images == 22 - len(broken)
    assert evaluation.unreadable == [f"image {index} is broken" for index in broken]


def test_the_shares_of_processes_add_up(model):
    samples = Samples(23, broken=(3, 8))
    whole = evaluate(model, load(samples), Accelerator(), CLASSES)
    parts = [evaluate(model, load(samples, share=Share(rank, 2)), Accelerator(), CLASSES) for rank in range(2)]
    assert sum(part.confusion for part in parts).tolist() == whole.confusion.tolist()
    assert sum(part.loss * part.images for part in parts) == pytest.approx(whole.loss * whole.images)
    assert sorted(line for part in parts for line in part.unreadable) == sorted(whole.unreadable)


def test_some_outputs_and_several_right_classes(model):
    samples = Samples(22)
    outputs, accepted = torch.tensor([6, 2, 4]), torch.tensor([[0, 1], [2, -1], [1, -1], [2, 0], [0, -1], [1, 2]])
    evaluation = evaluate(model, load(samples), Accelerator(), 3, outputs=outputs, accepted=accepted)
    with torch.no_grad():
        probabilities = model(samples.images)[:, outputs].double().softmax(1)
    sets = [[i for i in accepted[label].tolist() if i >= 0] for label in samples.labels]
    losses = [-math.log(sum(row[i] for i in own)) for row, own in zip(probabilities.tolist(), sets, strict=True)]
    hits = [int(row.argmax()) in own for row, own in zip(probabilities, sets, strict=True)]
    assert evaluation.loss == pytest.approx(np.mean(losses), rel=1e-5)
    assert evaluation.top1 == pytest.approx(np.mean(hits))
    assert evaluation.top5 == 1
    assert evaluation.confusion.sum(0).tolist() == probabilities.argmax(1).bincount(minlength=3).tolist()


def test_a_label_that_is_no_class(model):
    with pytest.raises(UserError, match=r"an image is labelled 5: expected 0 to 2, the classes"):
        evaluate(model, load(Samples(22)), Accelerator(), 3, outputs=torch.arange(3))


def test_nothing_to_evaluate(model):
    samples = Samples(2, broken=(0, 1))
    with pytest.raises(UserError, match="no image was evaluated: image 0 is broken"):
        evaluate_timed(model, HeldOut(samples, ["a"] * CLASSES), load(samples), Accelerator())


# the labels of ImageNet's variants


class Decoder(torch.nn.Module):
    """Reads the class off an image's colour; likelier than any in a subset of classes is `decoy`."""

    def __init__(self, decoy=None):
        super().__init__()
        self.decoy, self.num_classes = decoy, 1000

    def forward(self, pixels):
        logits = torch.zeros(len(pixels), 1000)
        index = pixels[:, 0, 0, 0].long() + 256 * pixels[:, 1, 0, 0].long()
        logits[torch.arange(len(pixels)), index] = 1
        if self.decoy is not None:
            logits[:, self.decoy] = 2
        return logits


def named(num_classes):
    """Only the number of classes of a model."""
    model = torch.nn.Module()
    model.num_classes = num_classes
    return model


def paint(path, index):
    """An image in the colour that stands for a class."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (2, 2), (index % 256, index // 256, 0)).save(path, "PNG")  # whatever it is called


def pixels(image):
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)


def folder(root, **options):
    return ImageData(**{"dataset": "folder", "root": str(root), "batch_size": 4, "num_workers": 0, **options})


def decode(images, decoy=None):
    loader = load(images.dataset, pixels, batch_size=100)
    return evaluate_timed(Decoder(decoy), images, loader, Accelerator())[0]


@pytest.mark.parametrize("labels", ["a", "r"])
@pytest.mark.parametrize("below", ["", "val"])
def test_a_subset_of_the_classes(labels, below, tmp_path):
    names = (Path(timm.data.__file__).parent / f"_info/imagenet_{labels}_synsets.txt").read_text().split()
    for name in names:
        paint(tmp_path / below / name / "a.png", SYNSETS.index(name))
    images = held_out(folder(tmp_path), labels, Candidate(Decoder(), None, "raw"), "RGB", "a.pth")
    assert images.classes == names
    evaluation = decode(images, decoy=0)  # the tench, in neither subset
    assert (evaluation.images, evaluation.top1) == (200, 1)
    assert evaluation.loss == pytest.approx(math.log(math.e + 199) - 1, rel=1e-5)  # not over 1,000


def test_folders_named_by_numbers(tmp_path):
    for index in range(1000):
        paint(tmp_path / str(index) / "a.png", index)
    images = held_out(folder(tmp_path), "v2", Candidate(Decoder(), SYNSETS, "ema"), "RGB", "a.pth")
    assert images.dataset.classes[:3] == ["0", "1", "10"]
    evaluation = decode(images._replace(dataset=torch.utils.data.Subset(images.dataset, range(0, 1000, 7))))
    assert (evaluation.images, evaluation.top1) == (143, 1)
    assert images.classes == SYNSETS
    (tmp_path / "999/a.png").unlink()
    (tmp_path / "999").rmdir()
    message = (
        r"--labels v2: expected the 1000 classes of ImageNet-V2 \(0, 1, 2, ...\) in the data, found 999 \(0, 1, 10"
    )
    with pytest.raises(UserError, match=message):
        held_out(folder(tmp_path), "v2", Candidate(Decoder(), None, "raw"), "RGB", "a.pth")


class Chosen(torch.nn.Module):
    """Logits (images, 1000) drawn once, in the order of the images' first pixels."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, pixels):
        return self.logits[pixels[:, 0, 0, 0].long()]


@pytest.mark.parametrize("below", ["", "val", "val/n01440764"])
def test_several_labels_an_image(below, tmp_path):
    names = [f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, 31)]
    for place, name in enumerate(names):
        paint(tmp_path / below / name, place)
    images = held_out(folder(tmp_path), "real", Candidate(Decoder(), SYNSETS, "raw"), "RGB", "a.pth")

    real = RealLabelsImagenet([*names, *["other"] * 49_970])
    logits = torch.randn(30, 1000, generator=torch.Generator().manual_seed(0))
    for place, name in enumerate(names[::2]):  # every other image is right, by its last label
        for label in real.real_labels[name][-1:]:
            logits[2 * place, label] = 10
    real.add_result(logits)

    loader = load(images.dataset, pixels, batch_size=8)
    evaluation, _ = evaluate_timed(Chosen(logits), images, loader, Accelerator())
    assert evaluation.images == sum(bool(real.real_labels[name]) for name in names) < 30
    assert 100 * evaluation.top1 == pytest.approx(real.get_accuracy(1))
    assert 100 * evaluation.top5 == pytest.approx(real.get_accuracy(5))
    assert 0.2 < evaluation.top1 < 0.8


def test_files_or_folders_that_do_not_fit_the_labels(tmp_path):
    root = write_folder(tmp_path / "data")
    candidate = Candidate(Decoder(), SYNSETS, "raw")

    def choose(labels, candidate=candidate, root=root, **data):
        held_out(folder(root, **data), labels, candidate, "RGB", "a.pth")

    message = (
        r"labels a: expected the 200 classes of ImageNet-A \(n01498041, .*\) in the data, found 2 \(cat, dog\), 200 of"
    )
    with pytest.raises(UserError, match=message):
        choose("a")
    with pytest.raises(
        UserError, match="real: expected files named ILSVRC2012_val_00000001.JPEG .* 8 others, first .*png"
    ):
        choose("real")
    with pytest.raises(UserError, match="real needs the files of .*: data.dataset=folder, .* got 'digits'"):
        choose("real", dataset="digits")
    paint(tmp_path / "unlabelled/ILSVRC2012_val_00000001.JPEG", 0)
    with pytest.raises(UserError, match="none of the images in .*unlabelled has a label"):
        choose("real", root=tmp_path / "unlabelled")
    with pytest.raises(UserError, match=r"labels r needs a model of ImageNet's 1000 .*: a.pth has 2 \(cat, dog\)"):
        choose("r", Candidate(named(2), ["cat", "dog"], "raw"))
    with pytest.raises(UserError, match=r"labels r needs a model of ImageNet's 1000 .* in their order"):
        choose("r", Candidate(named(1000), SYNSETS[::-1], "raw"))
    with pytest.raises(UserError, match="data.root must name the folder"):
        choose("none", root="")


def test_the_data_has_the_classes_of_the_model(tmp_path):
    def choose(num_classes, classes, **data):
        return held_out(folder(tmp_path, **data), "none", Candidate(named(num_classes), classes, "raw"), "L", "a.pth")

    write_folder(tmp_path)
    assert choose(2, ["cat", "dog"]).classes == ["cat", "dog"]
    assert choose(2, None).classes == ["cat", "dog"]  # a published file
    assert choose(10, None, dataset="digits").classes == list("0123456789")
    with pytest.raises(UserError, match=r"a.pth was trained on other classes \(2: dog, cat\) than .* \(2: cat, dog\)"):
        choose(2, ["dog", "cat"])
    with pytest.raises(UserError, match=r"on other classes \(1000: n01440764, .*\) than the config's data has \(2:"):
        choose(1000, None)


# weights and sizes


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The checkpoint of a run that averaged its weights, and one as if it had not."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as monkeypatch:
        few_digits(monkeypatch)
        run_of(tiny_recipe(train__ema_decay=0.9, schedule__num_epochs=1), folder).fit()
    state = torch.load(folder / "last.pth", weights_only=True)
    torch.save({**state, "model": state["training"]["model"]}, folder / "raw.pth")
    return {"ema": folder / "last.pth", "raw": folder / "raw.pth"}


def test_which_weights(runs, tmp_path):
    state = torch.load(runs["ema"], weights_only=True)
    candidate = load_candidate(runs["ema"])
    assert (candidate.weights, candidate.classes) == ("ema", list("0123456789"))
    assert torch.equal(candidate.model.head.weight, state["model"]["head.weight"])
    assert load_candidate(runs["ema"], weights="ema").weights == "ema"
    candidate = load_candidate(runs["ema"], weights="raw")
    assert candidate.weights == "raw"
    assert torch.equal(candidate.model.head.weight, state["training"]["model"]["head.weight"])
    assert load_candidate(runs["raw"]).weights == "raw"
    assert load_candidate(runs["raw"], weights="raw").weights == "raw"
    with pytest.raises(UserError, match="holds no running average .* without train.ema_decay"):
        load_candidate(runs["raw"], weights="ema")

    del state["training"]
    torch.save(state, tmp_path / "a.pth")
    assert load_candidate(tmp_path / "a.pth").weights == "saved"
    with pytest.raises(UserError, match="holds one set of weights .* leave out --raw"):
        load_candidate(tmp_path / "a.pth", weights="raw")
    state["meta"]["classes"].pop()
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(UserError, match="a.pth is of 10 classes, and its classes are of others"):
        load_candidate(tmp_path / "a.pth")


def test_published_weights(tmp_path):
    models = [timm.create_model("test_vim", num_classes=n) for n in (3, 3, 0)]
    torch.save({"model": models[0].state_dict(), "model_ema": models[1].state_dict()}, tmp_path / "a.pth")
    for weights, model in ((None, models[0]), ("raw", models[0]), ("ema", models[1])):
        candidate = load_candidate(tmp_path / "a.pth", name="test_vim", weights=weights)
        assert (candidate.weights, candidate.classes) == (weights or "raw", None)
        assert torch.equal(candidate.model.head.weight, model.head.weight)
    torch.save({"model": models[2].state_dict()}, tmp_path / "b.pth")
    with pytest.raises(UserError, match="b.pth has no classifier"):
        load_candidate(tmp_path / "b.pth", name="test_vim")
    with pytest.raises(UserError, match="b.pth holds no running average"):
        load_candidate(tmp_path / "b.pth", name="test_vim", weights="ema")


def test_another_size(model):
    assert resized(model, None) is model
    larger = resized(model, 64)
    assert larger(torch.randn(1, 3, 64, 64)).shape == (1, CLASSES)
    assert (larger.img_size, model.img_size) == ((64, 64), (32, 32))
    wanted = copy.deepcopy(model)
    wanted.set_input_size(64)
    assert torch.equal(larger.pos_embed, wanted.pos_embed)
    with pytest.raises(UserError, match=r"--img-size 8 does not fit the model: img_size must be at least the patch"):
        resized(model, 8)
    with pytest.raises(UserError, match="--img-size 64: a Decoder has no set_input_size"):
        resized(Decoder(), 64)


def test_images_come_in_the_size_of_the_model(model):
    data = folder("", batch_size=2, eval_transform={"crop_pct": 1.0, "input_size": (3, 32, 48)})
    assert image_size(model, for_size(data, None)) == "32x48"
    larger = resized(model, 64)
    assert image_size(larger, for_size(data, 64)) == "64"
    dataset = [(Image.new("RGB", (20, 20)), 0)] * 3
    loader = build_loader(for_size(data, 64), dataset, larger, WHOLE, is_training=False)
    assert next(iter(loader)).images.shape == (2, 3, 64, 64)


def test_an_unreadable_file(model, tmp_path):
    root = write_folder(tmp_path, val=[f"class {i}" for i in range(CLASSES)], count=2)
    broken = write_truncated(root / "val/class 0/0.png")
    data = folder(root)
    images = held_out(data, "none", Candidate(model, None, "raw"), "RGB", "a.pth")
    loader = build_loader(data, images.dataset, model, WHOLE, is_training=False)
    evaluation, seconds = evaluate_timed(model, images, loader, Accelerator())
    assert (evaluation.images, len(evaluation.unreadable)) == (2 * CLASSES - 1, 1)
    assert str(broken) in evaluation.unreadable[0]
    assert seconds > 0


# what is written


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def evaluation():
    return Evaluation(0.5, 0.75, 1.0, torch.tensor([[2, 1, 0], [0, 1, 0], [0, 0, 0]]), ["a, b", "c"])


def result_of(evaluation, size="224"):
    about = {"checkpoint": "a,b.pth", "config": "c.py", "weights": "ema", "labels": "none", "seconds": 1.5}
    return Result.of(evaluation, img_size=size, **about)


def test_results_are_added(evaluation, tmp_path):
    path = tmp_path / "new/results.csv"
    for size in ("224", "288"):
        open_results(path, columns())
        with appending(path) as file:
            append_result(file, result_of(evaluation, size))
    assert path.read_text().splitlines()[0] == ",".join(columns())
    rows = table(path)
    assert [row["img_size"] for row in rows] == ["224", "288"]
    assert rows[0]["checkpoint"] == "a,b.pth"
    assert {rows[0][key] for key in ("images", "unreadable", "loss", "top1", "top5")} == {
        "4",
        "2",
        "0.5",
        "0.75",
        "1.0",
    }
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d", rows[0]["date"])


def test_a_row_that_a_full_disk_cuts_off_is_not_there(evaluation, tmp_path):
    path = tmp_path / "results.csv"
    open_results(path, columns())
    with pytest.raises(OSError, match="No space left") as caught, appending(path) as file:  # noqa: PT012
        file.write("half of a row,")
        file.flush()
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.filename == str(path)
    assert path.read_text() == ",".join(columns()) + "\n"


def test_tables_are_not_mixed(evaluation, tmp_path):
    path = tmp_path / "results.csv"
    path.write_text("date,top1\n1,2\n")
    with pytest.raises(
        UserError, match="has other columns: expected date,checkpoint,.*, found date,top1; name another"
    ):
        open_results(path, columns())
    path.write_text(",".join(columns()) + "\n2025-01-01")
    with pytest.raises(UserError, match="results.csv ends within a line"):
        open_results(path, columns())
    assert path.read_text().endswith("01-01")


def test_the_accuracy_of_each_class(evaluation, tmp_path):
    classes = ["cat, small", "dog", "owl"]
    names = write_evaluation(tmp_path, "test", evaluation, classes)
    assert names == ["confusion_test.png", "classes_test.csv", "unreadable_test.txt"]
    rows = table(tmp_path / names[1])
    assert [tuple(row.values()) for row in rows] == [
        ("cat, small", "3", str(2 / 3)),
        ("dog", "1", "1.0"),
        ("owl", "0", ""),
    ]
    assert (tmp_path / names[2]).read_text() == "a, b\nc\n"
    evaluation.unreadable.clear()
    assert write_evaluation(tmp_path, "test", evaluation, classes) == names[:2]
    assert not (tmp_path / names[2]).exists()


def test_a_picture_of_sizes(evaluation, tmp_path):
    plot_sizes(tmp_path / "a.png", [result_of(evaluation, size) for size in ("448", "64")])
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (720, 480)
