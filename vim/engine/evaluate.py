"""How well a model does on a data set: the figures, what they are taken of, and where they are kept."""

import copy
import csv
import json
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import Dataset

from vim.data import IGNORED, class_names, find_images, input_options, part, read_image
from vim.data.images import image_folder
from vim.data.video import Videos
from vim.engine.files import make_folder, write_csv
from vim.engine.log import plot_confusion
from vim.engine.objectives import weights_of_model
from vim.engine.weights import load_published, load_trained, load_weights, read_trained
from vim.errors import UserError, describe

# the sets of labels of ImageNet's classes, beside a data set's own ("none")
LABELS = {"a": "ImageNet-A", "r": "ImageNet-R", "v2": "ImageNet-V2", "real": "ImageNet-ReaL"}


@dataclass
class Evaluation:
    """The results on a held-out set: accuracies as shares of one, confusion as counts (actual, predicted).

    `unreadable` has a line for each image that could not be read, those of all processes; no figure counts them.
    """

    loss: float
    top1: float
    top5: float
    confusion: Tensor
    unreadable: list[str]

    @property
    def images(self) -> int:
        """How many images the figures are of."""
        return int(self.confusion.sum())


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: Any,
    accelerator: Accelerator,
    num_classes: int,
    *,
    outputs: Tensor | None = None,
    accepted: Tensor | None = None,
) -> Evaluation:
    """Run the model over a loader's batches; on several processes each sees a part, and all get the whole result.

    Args:
        num_classes: how many classes are told apart.
        outputs: (num_classes,) the model's outputs for them; by default all, in their order.
        accepted: (labels, most) the classes that are right for each label, filled up with `IGNORED`; by default the
            one of that number. Of several, any counts as right, the loss is that of their joint probability, and the
            confusion has the predicted one as the actual where it is right, else the first.

    Raises:
        UserError: a label that is none of the classes.
    """
    was_training = model.training
    model.eval()
    device = accelerator.device
    confusion = torch.zeros(num_classes * num_classes, dtype=torch.int64, device=device)
    loss = torch.zeros((), dtype=torch.float64, device=device)
    in_top5 = torch.zeros((), dtype=torch.int64, device=device)
    unreadable: list[str] = []
    kept = None if outputs is None else outputs.to(device)
    for images, labels, lines in loader:
        unreadable += lines
        if not images.numel():  # none can be read
            continue
        counted = labels != IGNORED
        with accelerator.autocast():
            logits = model(images.to(device, non_blocking=True))[counted.to(device)]
        if not counted.any():
            continue
        labels = labels[counted]
        right = labels.unsqueeze(1) if accepted is None else accepted[labels]  # (b, most)
        if int(right.max()) >= num_classes:
            raise UserError(f"an image is labelled {int(right.max())}: expected 0 to {num_classes - 1}, the classes")
        logits, right = logits.float(), right.to(device)
        logits = logits if kept is None else logits[:, kept]
        log_probs = logits.log_softmax(1).gather(1, right.clamp(min=0)).masked_fill(right == IGNORED, -torch.inf)
        loss -= log_probs.logsumexp(1).double().sum()
        top5 = logits.topk(min(5, num_classes)).indices
        in_top5 += (top5.unsqueeze(2) == right.unsqueeze(1)).flatten(1).any(1).sum()
        predicted = logits.argmax(1)
        actual = torch.where((right == predicted.unsqueeze(1)).any(1), predicted, right[:, 0])
        confusion += torch.bincount(actual * num_classes + predicted, minlength=num_classes**2)
    model.train(was_training)
    loss, in_top5, confusion = (accelerator.reduce(total) for total in (loss, in_top5, confusion))
    confusion = confusion.view(num_classes, num_classes).cpu()
    count = max(int(confusion.sum()), 1)
    return Evaluation(
        loss.item() / count,
        confusion.trace().item() / count,
        in_top5.item() / count,
        confusion,
        gather_object(unreadable),
    )


class Views(Dataset[Any]):
    """The views of videos that a data set gives; the label of each is its place among them.

    Attributes:
        videos: for each view which video it is of: those of one path are of one, whatever lines name it.
        labels: of the videos.
    """

    def __init__(self, dataset: Videos) -> None:
        self.dataset, self.num_frames = dataset, dataset.num_frames
        number_of: dict[str, int] = {}
        paths = [dataset.video_of(index) for index in range(len(dataset))]
        self.videos = torch.tensor([number_of.setdefault(path, len(number_of)) for path in paths])
        label_of = {video.path: video.label for video in dataset.videos}
        self.labels = torch.tensor([label_of[path] for path in number_of])

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.dataset[index][0], index


@torch.inference_mode()
def evaluate_views(model: nn.Module, loader: Any, accelerator: Accelerator, classes: int) -> Evaluation:
    """The accuracy on videos of the probabilities' mean over their views, as VideoMamba's is evaluated.

    Each process sees a part of the views, each view once.

    Args:
        loader: of :class:`Views`.
        classes: how many there are.

    Raises:
        UserError: a label that is none of the classes.
    """
    views: Views = loader.dataset.dataset
    labels = views.labels
    if labels.max() >= classes:
        raise UserError(f"a video is labelled {labels.max()}: expected 0 to {classes - 1}, the classes")
    model.eval()
    total = torch.zeros(len(labels), classes, dtype=torch.float64, device=accelerator.device)
    count = torch.zeros(len(labels), dtype=torch.int64, device=accelerator.device)
    unreadable: dict[str, None] = {}
    for clips, places, lines in loader:
        unreadable |= dict.fromkeys(lines)
        seen = places != IGNORED
        if not seen.any():
            continue
        with accelerator.autocast():
            logits = model(clips[seen].to(accelerator.device, non_blocking=True))
        videos = views.videos[places[seen]].to(accelerator.device)
        total.index_add_(0, videos, logits.double().softmax(1))
        count.index_add_(0, videos, torch.ones_like(videos))
    total, count = accelerator.reduce(total).cpu(), accelerator.reduce(count).cpu()
    known = count > 0
    probabilities, actual = total[known] / count[known].unsqueeze(1), labels[known]
    top5 = probabilities.topk(min(5, classes)).indices
    confusion = torch.bincount(actual * classes + probabilities.argmax(1), minlength=classes**2).view(classes, classes)
    share = 1 / max(len(actual), 1)
    return Evaluation(
        -share * float(probabilities.gather(1, actual.unsqueeze(1)).log().sum()),
        share * int(confusion.trace()),
        share * int((top5 == actual.unsqueeze(1)).sum()),
        confusion,
        list(dict.fromkeys(gather_object(list(unreadable)))),
    )


class Candidate(NamedTuple):
    """A model in evaluation mode, its classes' names (None: the file does not say), and which of its weights it has.

    The weights are "ema", the running average, or "raw"; "saved" where the file has one set and does not say which.
    """

    model: Any
    classes: list[str] | None
    weights: str


def load_candidate(path: Path, *, name: str | None = None, weights: str | None = None) -> Candidate:
    """The model of a run's checkpoint, or of a published file.

    Args:
        name: a model of this package: then the file is of the published layout.
        weights: "ema" or "raw"; by default what the file has to be used, which is a run's running average where it
            keeps one, and the raw weights of a published file.

    Raises:
        UserError: the file cannot be read, does not fit, or lacks those weights.
    """
    if name is not None:
        model: Any = load_published(name, path, use_ema=weights == "ema")
        if model.num_classes == 0:
            raise UserError(f"{path} has no classifier: there is nothing to evaluate")
        return Candidate(model, None, weights or "raw")
    model, meta = load_trained(path)
    if model.num_classes != len(meta["classes"]):
        raise UserError(f"{path} is of {model.num_classes} classes and names {len(meta['classes'])}: it is damaged")
    raw = weights_of_model(read_trained(path).get("training", {}).get("model", {}))
    if not raw:
        if weights is not None:
            raise UserError(f"{path} holds one set of weights and does not say which: leave out --{weights}")
        return Candidate(model, meta["classes"], "saved")
    raw_model = copy.deepcopy(model)
    load_weights(raw_model, raw, path)
    averaged = any(not torch.equal(one, raw_model.get_parameter(key)) for key, one in model.named_parameters())
    if weights == "ema" and not averaged:
        raise UserError(f"{path} holds no running average of the weights: it was trained without train.ema_decay")
    if weights == "raw" or not averaged:
        return Candidate(raw_model, meta["classes"], "raw")
    return Candidate(model, meta["classes"], "ema")


def resized(model: Any, size: int | None) -> Any:
    """A copy of a model for images of that height and width in pixels; None for the model as it is.

    Raises:
        UserError: the model takes no other size than its own, or not this one.
    """
    if size is None:
        return model
    if not hasattr(model, "set_input_size"):
        raise UserError(f"--img-size {size}: a {type(model).__name__} has no set_input_size, leave out --img-size")
    model = copy.deepcopy(model)  # a table resized twice is not the table resized once
    try:
        model.set_input_size(size)
    except Exception as error:  # timm's models raise many kinds, and assertions
        raise UserError(f"--img-size {size} does not fit the model: {describe(error)}") from error
    return model


def for_size(data: Mapping[str, Any], size: int | None) -> dict[str, Any]:
    """A config's data section for :func:`resized`: a size that is asked for goes before that of `eval_transform`."""
    transform = dict(data.get("eval_transform", {}))
    if size is not None:
        transform.pop("input_size", None)
    return {**data, "eval_transform": transform}


class HeldOut(NamedTuple):
    """Images with labels, the names of the classes, and what :func:`evaluate` is to make of outputs and labels."""

    dataset: Any
    classes: list[str]
    outputs: Tensor | None = None
    accepted: Tensor | None = None


class RealImages(Dataset[Any]):
    """Image files as PIL images; the label of each is its place in the list."""

    def __init__(self, paths: Sequence[Path], mode: str) -> None:
        self.paths, self.mode = paths, mode

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return read_image(self.paths[index], self.mode), index


def held_out(data: Mapping[str, Any], labels: str, candidate: Candidate, mode: str, source: Path) -> HeldOut:
    """What a model is evaluated on: the `val` part of a config's data.

    A folder without `val` in it is taken for that part itself, as the variants of ImageNet are packed.

    Args:
        labels: "none": the data set's own, which must be the model's classes. "a", "r" (https://arxiv.org/abs/1907.07174,
            https://arxiv.org/abs/2006.16241): 200 folders named by WordNet ids; of the model's outputs only theirs are
            compared. "v2" (https://arxiv.org/abs/1902.10811): folders named 0 to 999. "real"
            (https://arxiv.org/abs/2006.07159): several labels an image, by its file's name wherever below the folder;
            those without any are left out.
        mode: PIL's name for the kind of images: "L" for grey.
        source: the model's file, for errors.

    Raises:
        UserError: the data cannot be read, or its classes are not those of the labels or of the model.
    """
    if labels == "none":
        dataset = _images(data, mode)
        return HeldOut(dataset, own_classes(data, dataset, candidate, source))
    synsets = _timm_list("imagenet_synsets.txt")
    _check_imagenet(candidate, synsets, labels, source)
    if labels == "real":
        return _real(data, mode, synsets)
    dataset = _images(data, mode)
    if labels == "v2":
        index_of = {str(index): index for index in range(len(synsets))}
    else:
        names, indices = (_timm_list(f"imagenet_{labels}_{kind}.txt") for kind in ("synsets", "indices"))
        index_of = dict(zip(names, map(int, indices), strict=True))
    place = {name: i for i, name in enumerate(index_of)}
    found = class_names(dataset) or []
    if set(found) != set(index_of):
        raise UserError(
            f"--labels {labels}: expected the {len(index_of)} classes of {LABELS[labels]} ({_some(index_of)}) in the "
            f"data, found {len(found)} ({_some(found)}), {len(set(index_of) - set(found))} of them missing"
        )
    outputs = torch.tensor(list(index_of.values()))
    accepted = torch.tensor([[place[name]] for name in found])
    return HeldOut(dataset, [synsets[index] for index in index_of.values()], outputs, accepted)


def _timm_list(name: str) -> list[str]:
    return (files("timm.data") / "_info" / name).read_text().split()


def _some(names: Collection[str]) -> str:
    return ", ".join([*list(names)[:3], *(["..."] if len(names) > 3 else [])]) or "names unknown"


def _folder(data: Mapping[str, Any]) -> Path | None:
    """The folder that holds the images; None where a data set finds them itself, or complains."""
    root = Path(str(data.get("root")))
    if data.get("dataset") != "folder" or not data.get("root") or not root.is_dir():
        return None
    return root / "val" if (root / "val").is_dir() else root


def _images(data: Mapping[str, Any], mode: str) -> Any:
    folder = _folder(data)
    return part(dict(data), "val", mode) if folder is None else image_folder(folder, mode)


def own_classes(data: Mapping[str, Any], dataset: Any, candidate: Candidate, source: Path) -> list[str]:
    """The names of the data set's classes, if they are the model's."""
    count, found = candidate.model.num_classes, class_names(dataset)
    # who publishes 1,000 classes keeps to the order of ImageNet's folders
    known = candidate.classes or (_timm_list("imagenet_synsets.txt") if count == 1000 else None)
    if found is None:
        return known or [str(i) for i in range(count)]
    # folders are sorted by name, so other names are another order; other data sets of ImageNet's have its order anyway
    by_number = known is None or (candidate.classes is None and data.get("dataset") not in ("folder", "tar"))
    if found != known and not (by_number and len(found) == count):
        raise UserError(
            f"{source} was trained on other classes ({count}: {_some(known or [])}) "
            f"than the config's data has ({len(found)}: {_some(found)})"
        )
    return found


def _check_imagenet(candidate: Candidate, synsets: list[str], labels: str, source: Path) -> None:
    """Refuse a model whose outputs are not, as far as one can tell, ImageNet's classes in their order."""
    names = candidate.classes or synsets
    same = names == synsets or not set(names) & set(synsets)  # names in words, or numbers, cannot be told
    if candidate.model.num_classes != len(synsets) or not same:
        raise UserError(
            f"--labels {labels} needs a model of ImageNet's {len(synsets)} classes in their order ({_some(synsets)}): "
            f"{source} has {candidate.model.num_classes} ({_some(candidate.classes or [])})"
        )


def _real(data: Mapping[str, Any], mode: str, synsets: list[str]) -> HeldOut:
    folder = _folder(data)
    if folder is None:
        raise UserError(
            "--labels real needs the files of ImageNet's validation images: data.dataset=folder, and data.root a "
            f"folder of them, got {data.get('dataset')!r} and {data.get('root')!r}"
        )
    lists = json.loads((files("timm.data") / "_info" / "imagenet_real_labels.json").read_text())
    labels_of = {f"ILSVRC2012_val_{number:08d}.JPEG": labels for number, labels in enumerate(lists, 1)}
    paths = find_images([folder])
    strange = [path for path in paths if path.name not in labels_of]
    if strange:
        raise UserError(
            f"--labels real: expected files named ILSVRC2012_val_00000001.JPEG to {len(lists):08d} in {folder}, found "
            f"{len(strange)} others, first {strange[0]}"
        )
    paths = [path for path in paths if labels_of[path.name]]
    if not paths:
        raise UserError(f"--labels real: none of the images in {folder} has a label")
    rows = [torch.tensor(labels_of[path.name]) for path in paths]
    accepted = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=IGNORED)
    return HeldOut(RealImages(paths, mode), synsets, accepted=accepted)


def evaluate_timed(model: Any, images: HeldOut, loader: Any, accelerator: Accelerator) -> tuple[Evaluation, float]:
    """:func:`evaluate`, and the seconds it took with reading the images.

    Raises:
        UserError: no image can be read, or the memory is full.
    """
    start = time.perf_counter()
    try:
        evaluation = evaluate(
            model.to(accelerator.device),
            loader,
            accelerator,
            len(images.classes),
            outputs=images.outputs,
            accepted=images.accepted,
        )
    except torch.OutOfMemoryError as error:
        raise UserError("the GPU's memory is full: lower data.batch_size with --cfg-options") from error
    if evaluation.images == 0:
        raise UserError(f"no image was evaluated: {(evaluation.unreadable or ['the data set is empty'])[0]}")
    return evaluation, time.perf_counter() - start


@dataclass
class Result:
    """A line of the table of results; its fields are the columns. Accuracies are shares of one.

    `date` is local, with its offset; `views` frames x crops x clips of a video, else empty; `img_size` height x width
    in pixels, or one number where they are the same.
    """

    date: str
    checkpoint: str
    config: str
    weights: str
    labels: str
    views: str
    img_size: str
    images: int
    unreadable: int
    loss: float
    top1: float
    top5: float
    seconds: float

    @classmethod
    def of(cls, evaluation: Evaluation, **about: Any) -> "Result":
        """The figures of an evaluation that has just ended, with the other columns."""
        return cls(
            date=datetime.now().astimezone().isoformat(timespec="seconds"),
            images=evaluation.images,
            unreadable=len(evaluation.unreadable),
            loss=evaluation.loss,
            top1=evaluation.top1,
            top5=evaluation.top5,
            **{"views": "", **about},
        )


COLUMNS = [field.name for field in fields(Result)]


def image_size(model: Any, data: Mapping[str, Any]) -> str:
    """What images are brought to: "224", or "224x192", height first."""
    height, width = {**input_options(model), **data.get("eval_transform", {})}["input_size"][-2:]
    return str(height) if height == width else f"{height}x{width}"


def open_results(path: Path) -> None:
    """Begin a table of results, or see that the one that is there can be added to.

    Raises:
        UserError: the file has other columns, or ends within a line.
    """
    make_folder(path.parent)
    with path.open("a+", newline="", errors="replace") as file:
        file.seek(0)
        text = file.read()
        if not text:
            csv.writer(file).writerow(COLUMNS)
            return
    found = text.splitlines()[0]
    if found != ",".join(COLUMNS):
        raise UserError(
            f"{path} has other columns: expected {','.join(COLUMNS)}, found {found[:100]}; name another --csv"
        )
    if not text.endswith("\n"):
        raise UserError(f"{path} ends within a line: complete it or take it out, or name another --csv")


def append_result(path: Path, result: Result) -> None:
    """Add a line to what :func:`open_results` has seen."""
    with path.open("a", newline="") as file:
        csv.DictWriter(file, COLUMNS).writerow(asdict(result))


def write_evaluation(folder: Path, tag: str, evaluation: Evaluation, classes: list[str]) -> list[str]:
    """Write the confusion matrix, the accuracy of each class, and which images could not be read; return the names.

    A class without images has no accuracy.
    """
    names = [f"confusion_{tag}.png", f"classes_{tag}.csv"]
    plot_confusion(folder / names[0], evaluation.confusion, classes)
    counts, right = evaluation.confusion.sum(1).tolist(), evaluation.confusion.diag().tolist()
    rows = zip(classes, counts, right, strict=True)
    write_csv(folder / names[1], [{"class": c, "count": n, "top1": r / n if n else ""} for c, n, r in rows])
    unreadable = folder / f"unreadable_{tag}.txt"
    unreadable.unlink(missing_ok=True)  # that of a former evaluation
    if evaluation.unreadable:
        unreadable.write_text("".join(f"{line}\n" for line in evaluation.unreadable))
        names.append(unreadable.name)
    return names


def plot_sizes(path: Path, results: Sequence[Result]) -> None:
    """Draw the accuracies over the sizes of the images."""
    import matplotlib.pyplot as plt

    results = sorted(results, key=lambda result: int(result.img_size))
    sizes = [int(result.img_size) for result in results]
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    axes.plot(sizes, [100 * result.top1 for result in results], "o-", label="top-1")
    axes.plot(sizes, [100 * result.top5 for result in results], "o-", label="top-5")
    axes.set(xlabel="height and width of the images, pixels", ylabel="accuracy, %", xticks=sizes)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
