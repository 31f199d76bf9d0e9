"""Models to evaluate: read from a checkpoint, and resized."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from vim.engine.students import own_weights
from vim.engine.weights import load_published, load_trained, load_weights
from vim.errors import UserError, describe
from vim.options import ImageData
from vim.typing import VisionModel


class Candidate(NamedTuple):
    """A model in evaluation mode.

    Attributes:
        classes: their names, None if the file has none.
        weights: "ema" (the running average) or "raw"; "saved" if the file has one set of unknown kind.
        thresholds: the probabilities from which on labels are predicted; None if an image has one class.
    """

    model: VisionModel
    classes: list[str] | None
    weights: str
    thresholds: list[float] | None = None


def load_candidate(path: Path, *, name: str | None = None, weights: str | None = None) -> Candidate:
    """Return the model of a run's checkpoint, or of a published file.

    Args:
        name: the model of this package that a file of the published layout is for; None for a run's checkpoint.
        weights: "ema" or "raw"; by default the weights meant for use: the running average if the run kept one, and
            the raw weights of a published file.

    Raises:
        UserError: the file cannot be read, does not fit, or lacks those weights.
    """
    if name is not None:
        model = load_published(name, path, use_ema=weights == "ema")
        if model.num_classes == 0:
            raise UserError(f"{path} has no classifier: there is nothing to evaluate")
        return Candidate(model, None, weights or "raw")
    model, state = load_trained(path)
    classes, training, thresholds = state["meta"]["classes"], state.get("training", {}), state["meta"].get("thresholds")
    if not training:
        if weights is not None:
            raise UserError(f"{path} holds one set of weights and does not say which: leave out --{weights}")
        return Candidate(model, classes, "saved", thresholds)
    raw = own_weights(training["model"]) if training.get("student") else training["model"]
    raw_model = copy.deepcopy(model)
    load_weights(raw_model, raw, path)
    averaged = any(not torch.equal(one, raw_model.get_parameter(key)) for key, one in model.named_parameters())
    if weights == "ema" and not averaged:
        raise UserError(f"{path} holds no running average of the weights: it was trained without train.ema_decay")
    if weights == "raw" or not averaged:
        return Candidate(raw_model, classes, "raw", thresholds)
    return Candidate(model, classes, "ema", thresholds)


def resized(model: VisionModel, size: int | None) -> VisionModel:
    """Return a copy of a model for images of that height and width in pixels, or the model itself if None.

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


def for_size(data: ImageData, size: int | None) -> ImageData:
    """Return the data options for a :func:`resized` model, without the size that `eval_transform` may have."""
    transform = {name: value for name, value in data.eval_transform.items() if size is None or name != "input_size"}
    return replace(data, eval_transform=transform)
