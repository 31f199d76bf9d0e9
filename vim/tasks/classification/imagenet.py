"""What a classifier is evaluated on: held-out images with labels, or a variant of ImageNet."""

import json
from collections.abc import Collection
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vim.data import IGNORED, ImageFiles, class_names, find_images, part, several_labels
from vim.data.datasets import Part
from vim.data.images import image_folder
from vim.errors import UserError
from vim.options import ImageData
from vim.tasks.classification.candidates import Candidate

# sets of labels of ImageNet's classes, besides a data set's own labels ("none")
LABELS = {"a": "ImageNet-A", "r": "ImageNet-R", "v2": "ImageNet-V2", "real": "ImageNet-ReaL"}


class HeldOut(NamedTuple):
    """Images with labels, the names of the classes, and arguments of :func:`evaluate` or :func:`evaluate_several`."""

    dataset: Part
    classes: list[str]
    outputs: Tensor | None = None
    accepted: Tensor | None = None
    thresholds: list[float] | None = None


def held_out(data: ImageData, labels: str, candidate: Candidate, mode: str, source: Path) -> HeldOut:
    """Return what a model is evaluated on: the `val` part of a recipe's data.

    If a folder has no `val` folder in it, it is that part itself, as the variants of ImageNet are packed.

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
        return HeldOut(dataset, own_classes(data, dataset, candidate, source), thresholds=candidate.thresholds)
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


def _folder(data: ImageData) -> Path | None:
    """Return the folder that holds the images; None if the data set finds them itself, or refuses the options."""
    root = Path(str(data.root))
    if data.dataset != "folder" or data.labels or not data.root or not root.is_dir():
        return None
    return root / "val" if (root / "val").is_dir() else root


def _images(data: ImageData, mode: str) -> Part:
    folder = _folder(data)
    return part(data, "val", mode) if folder is None else image_folder(folder, mode)


def own_classes(data: ImageData, dataset: Part, candidate: Candidate, source: Path) -> list[str]:
    """Return the names of the data set's classes.

    Raises:
        UserError: they are not the model's, or only one of the two has several labels an image.
    """
    several = several_labels(dataset)
    if candidate.classes and several != (candidate.thresholds is not None):
        kinds = ("one class", "any number of labels")
        raise UserError(
            f"{source} was trained on images with {kinds[not several]} each, and the config's data has {kinds[several]}"
        )
    count, found = candidate.model.num_classes, class_names(dataset)
    # published models of 1,000 classes have ImageNet's, in the order of its folders
    known = candidate.classes or (_timm_list("imagenet_synsets.txt") if count == 1000 else None)
    if found is None:
        return known or [str(i) for i in range(count)]
    # folders are sorted by name, so other names mean another order; other data sets keep ImageNet's order
    by_number = known is None or (candidate.classes is None and data.dataset not in ("folder", "tar"))
    if found != known and not (by_number and len(found) == count):
        raise UserError(
            f"{source} was trained on other classes ({count}: {_some(known or [])}) "
            f"than the config's data has ({len(found)}: {_some(found)})"
        )
    return found


def _check_imagenet(candidate: Candidate, synsets: list[str], labels: str, source: Path) -> None:
    """Raise UserError if the model's outputs are not, as far as their names show, ImageNet's classes in order."""
    names = candidate.classes or synsets
    same = names == synsets or not set(names) & set(synsets)  # names in words, or numbers, say nothing
    if candidate.model.num_classes != len(synsets) or not same:
        raise UserError(
            f"--labels {labels} needs a model of ImageNet's {len(synsets)} classes in their order ({_some(synsets)}): "
            f"{source} has {candidate.model.num_classes} ({_some(candidate.classes or [])})"
        )


def _real(data: ImageData, mode: str, synsets: list[str]) -> HeldOut:
    folder = _folder(data)
    if folder is None:
        raise UserError(
            "--labels real needs the files of ImageNet's validation images: data.dataset=folder, and data.root a "
            f"folder of them, got {data.dataset!r} and {data.root!r}"
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
    return HeldOut(ImageFiles(paths, mode), synsets, accepted=accepted)
