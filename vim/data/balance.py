"""Weights that make up for classes of which there are more images than of others."""

import torch
from torch import Tensor

from vim.errors import UserError


def all_labels(dataset: object, purpose: str) -> Tensor:
    """Return the labels of a data set: (n,) class indices, or (n, classes) as in :class:`vim.data.labels.Labels`.

    Args:
        purpose: what needs them, for the error.

    Raises:
        UserError: the data set has a label only together with its image, as a stream has.
    """
    labels = getattr(dataset, "targets", None)
    if labels is None:
        raise UserError(f"{purpose} needs a data set that lists its labels, such as a folder: a stream does not")
    return torch.as_tensor(labels)


def sampling_weights(labels: Tensor) -> Tensor:
    """Return a weight (n,) for each image, such that each class is drawn as often as the others.

    An image with several labels has the weight of its rarest one; images without any count as a class of their own.

    Args:
        labels: of :func:`all_labels`.
    """
    if labels.ndim == 1:
        return 1 / labels.bincount()[labels].double()
    positive = labels == 1
    positive = torch.cat([positive, ~positive.any(1, keepdim=True)], 1)
    return (positive / positive.sum(0).clamp(min=1).double()).amax(1)


def class_weights(dataset: object, classes: list[str], wanted: object) -> Tensor:
    """Return the weight of each class (classes,) in the loss.

    Args:
        dataset: the data set to train on.
        wanted: "balanced"; a number for each class; or numbers by the names of classes, where others have 1.
            Balanced weights are n / (classes * count), as scikit-learn defines them. Where an image may have several
            labels, a weight is that of an image with the label relative to one without, and a balanced one is the
            ratio of the latter's number to the former's.

    Raises:
        UserError: the weights are not those of the classes, or "balanced" finds no image of a class.
    """
    if wanted == "balanced":
        return _balanced(all_labels(dataset, "train.class_weights='balanced'"), classes)
    if isinstance(wanted, dict):
        unknown = [name for name in wanted if str(name) not in classes]
        if unknown:
            raise UserError(f"train.class_weights has {unknown[0]!r}, which is no class: expected {_some(classes)}")
        named = {str(name): number for name, number in wanted.items()}
        return torch.tensor([float(named.get(name, 1)) for name in classes])
    assert isinstance(wanted, tuple | list)
    if len(wanted) != len(classes):
        raise UserError(f"train.class_weights has {len(wanted)} numbers: expected {len(classes)}, one a class")
    return torch.tensor([float(number) for number in wanted])


def _balanced(labels: Tensor, classes: list[str]) -> Tensor:
    several = labels.ndim == 2
    counts = (labels == 1).sum(0) if several else labels.bincount(minlength=len(classes))
    if (counts == 0).any():
        name = classes[int((counts == 0).nonzero()[0])]
        raise UserError(f"train.class_weights='balanced': no image to train on is of the class {name!r}; give numbers")
    weights = (labels == 0).sum(0) / counts if several else len(labels) / (len(classes) * counts)
    if (weights == 0).any():
        name = classes[int((weights == 0).nonzero()[0])]
        raise UserError(f"train.class_weights='balanced': all images to train on are {name!r}; give numbers")
    return weights


def _some(names: list[str]) -> str:
    return ", ".join([*names[:5], *(["..."] if len(names) > 5 else [])])
