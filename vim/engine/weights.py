"""Files a run writes: safe to read, and never half written."""

import os
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from vim.errors import UserError, describe


def make_folder(path: Path) -> None:
    """Make a folder for results, and those it lies in.

    Raises:
        UserError: it cannot be made, or not be written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {path} ({error.strerror}): name another") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise UserError(f"cannot write to the folder {path}: name another, or change its permissions")


def save_atomically(state: dict[str, Any], path: Path) -> None:
    """Write beside the file, sync, rename: a kill at any time leaves the old file or the new one."""
    beside = path.with_name(f"{path.name}.part")
    with beside.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read what :class:`vim.engine.Trainer` saved; nothing in the file is executed.

    Raises:
        UserError: the file is missing, damaged, or not such a checkpoint.
    """
    if not path.is_file():
        raise UserError(f"no such checkpoint: {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds, with advice to load unsafely
        raise UserError(f"cannot read {path} as a checkpoint: it is damaged, or not of tools/train.py") from error
    if not isinstance(state, dict) or not {"model", "meta"} <= state.keys():
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
        UserError: a tensor is missing, left over, or of another shape; the first is named.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    for name in [*wanted, *found]:
        if wanted.get(name) != found.get(name):
            raise UserError(
                f"{source} is of another model: {name} is {found.get(name, 'missing')} there "
                f"and {wanted.get(name, 'missing')} in the model"
            )
    model.load_state_dict(weights)


def load_trained(path: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The model a checkpoint was trained as, in evaluation mode, and what the checkpoint says of it.

    Raises:
        UserError: the checkpoint cannot be read, or names a model that does not exist or fit.
    """
    state = read_checkpoint(path)
    try:
        model = timm.create_model(**state["meta"]["model"])
    except Exception as error:  # a model raises many kinds
        raise UserError(f"{path} names a model that cannot be built: {describe(error)}") from error
    load_weights(model, state["model"], path)
    return model.eval(), state["meta"]
