"""The checkpoints of a run: saved, found, read, and made into others."""

import logging
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm
import torch
from timm.models import save_for_hf
from torch import nn

import vim  # noqa: F401  registers the models
from vim.checkpoints import adapt, check_fit, read_checkpoint, rename
from vim.engine.files import link_whole, make_folder, written_whole
from vim.errors import UserError, describe

_logger = logging.getLogger(__name__)


def save_whole(state: dict[str, Any], path: Path) -> None:
    """Write a checkpoint: a kill at any time leaves the old file or the new one."""
    with written_whole(path) as beside, beside.open("wb") as file:
        torch.save(state, file)


def save_last(state: dict[str, Any], folder: Path, keep: int) -> Path:
    """Save `last.pth`, and keep the `keep - 1` before it as `last.1.pth`, `last.2.pth`, ...

    At any time there is a whole `last.pth`, once there has been one.
    """
    names = [folder / "last.pth", *(folder / f"last.{i}.pth" for i in range(1, keep))]
    for newer, older in reversed(list(zip(names[1:-1], names[2:], strict=True))):
        if newer.exists():
            newer.replace(older)
    if keep > 1 and names[0].exists():
        link_whole(names[0], names[1])
    save_whole(state, names[0])
    return names[0]


def _saves(folder: Path) -> list[Path]:
    """The saves in a folder, the newest first."""
    return [path for path in [folder / "last.pth", *(folder / f"last.{i}.pth" for i in range(1, 100))] if path.exists()]


def check_unused(folder: Path) -> None:
    """See that a new run in a folder overwrites no other.

    Raises:
        UserError: it would.
    """
    if _saves(folder):
        raise UserError(f"{folder} holds a run: go on with it by --resume, or name another folder by --work-dir")


def find_last(folder: Path) -> Path | None:
    """The newest readable of the saves in a folder; None if there is none.

    Raises:
        UserError: there are some, and none can be read.
    """
    problems = []
    for path in _saves(folder):
        try:
            read_trained(path)
        except UserError as error:
            problems.append(error)
            _logger.warning("%s: trying the one before", error)
            continue
        return path
    if problems:
        raise problems[0]
    return None


def read_trained(path: Path) -> dict[str, Any]:
    """Read what :class:`vim.engine.Trainer` saved; nothing in the file is executed.

    Raises:
        UserError: the file is missing, damaged, or not such a checkpoint.
    """
    state = read_checkpoint(path)
    if not {"model", "meta"} <= state.keys():
        raise UserError(
            f"{path} is not a checkpoint of tools/train.py: it lacks 'model' or 'meta' "
            "(published weights: tools/predict.py with --model NAME)"
        )
    if not isinstance(state["meta"], dict) or not {"model", "classes", "eval_transform"} <= state["meta"].keys():
        raise UserError(f"{path} is not a checkpoint of tools/train.py: it does not say what model it is of")
    return state


def load_weights(model: nn.Module, weights: dict[str, Any], source: Path) -> None:
    """Load a state dict into a model of the same architecture.

    Raises:
        UserError: a tensor is missing, left over, of another shape or not finite; the first is named.
    """
    check_fit(weights, model, source)
    model.load_state_dict(weights)


def load_published(name: str, path: Path, *, use_ema: bool = False) -> nn.Module:
    """A model with weights from a file of the published layout and as many classes as they, in evaluation mode.

    Args:
        use_ema: the running average of the weights.

    Raises:
        UserError: no such model here, no such file, or the weights are not the model's.
    """
    checkpoint = read_checkpoint(path)
    head = rename(checkpoint, path, use_ema=use_ema).get("head.weight")
    try:
        model = timm.create_model(name, num_classes=0 if head is None else len(head))
    except Exception as error:  # a model raises many kinds
        raise UserError(f"cannot build {name}: {describe(error)}") from error
    if not type(model).__module__.startswith("vim."):
        raise UserError(f"{name} is timm's: expected a model of this package, such as vim_tiny")
    model.load_state_dict(adapt(checkpoint, model, path, use_ema=use_ema))
    return model.eval()


def save_for_timm(model: nn.Module, folder: Path, classes: list[str] | None, transform: dict[str, Any]) -> None:
    """Write model.safetensors and config.json, which `timm.create_model("local-dir:FOLDER", pretrained=True)` reads.

    Args:
        classes: their names, in the order of the model's outputs.
        transform: what of the evaluation transform differs from the model's own.

    Raises:
        UserError: the folder cannot be written to.
    """
    make_folder(folder)
    with TemporaryDirectory(dir=folder) as scratch:  # each file whole, or not there
        config = {"label_names": classes} if classes else None
        save_for_hf(model, scratch, model_config=config, data_config=transform or None, safe_serialization=True)
        for path in Path(scratch).iterdir():
            path.replace(folder / path.name)


def load_trained(path: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The model a checkpoint was trained as, in evaluation mode, and what the checkpoint says of it.

    Raises:
        UserError: the checkpoint cannot be read, or names a model that does not exist or fit.
    """
    state = read_trained(path)
    try:
        model = timm.create_model(**state["meta"]["model"])
    except Exception as error:  # a model raises many kinds
        raise UserError(f"{path} names a model that cannot be built: {describe(error)}") from error
    load_weights(model, state["model"], path)
    return model.eval(), state["meta"]
