"""Checkpoints: saving, finding, reading and converting them."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, cast

import timm
import torch
from timm.models import save_for_hf
from torch import Tensor, nn

from vim.checkpoints import adapt, check_fit, of_now, read_checkpoint, rename
from vim.data import make_transform
from vim.engine.files import link_whole, make_folder, naming, written_whole
from vim.engine.rebuild import building, rebuild
from vim.engine.schema import Run, check
from vim.errors import UserError, describe
from vim.fields import Section, read
from vim.options import TransformOptions
from vim.registry import check_name, check_options, class_of, create, is_own
from vim.typing import OwnModel, VisionModel

State = dict[str, Any]  # see vim.engine.schema.Run

_logger = logging.getLogger(__name__)


def save_whole(state: State, path: Path) -> None:
    """Write a checkpoint: a kill at any time leaves the old file or the new one."""
    with written_whole(path) as beside, beside.open("wb") as file:
        torch.save(state, file)


def save_last(state: State, folder: Path, keep: int) -> Path:
    """Save `last.pth`, and keep the `keep - 1` saves before it as `last.1.pth`, `last.2.pth`, ...

    After the first save there is a complete `last.pth` at any time.
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
    """Return the saves in a folder, the newest first."""
    return [path for path in [folder / "last.pth", *(folder / f"last.{i}.pth" for i in range(1, 100))] if path.exists()]


class Save(NamedTuple):
    """A checkpoint of a run and the file it was read from."""

    path: Path
    state: State


def choose_save(resume: str | None, folder: Path) -> Save | None:
    """Return the save that a new process of a run resumes from, if any.

    Args:
        resume: a checkpoint's path; "auto" for the newest readable save in `folder`, if there is one; None for a new
            run.

    Raises:
        UserError: the new run would overwrite another one in `folder`, or the save cannot be read.
    """
    if resume == "auto":
        return find_last(folder)
    overwrites = resume is None or Path(resume).resolve().parent != folder.resolve()
    if overwrites and _saves(folder):
        raise UserError(f"{folder} holds a run: go on with it by --resume, or name another folder by --work-dir")
    return None if resume is None else Save(Path(resume), read_run(Path(resume)))


def find_last(folder: Path) -> Save | None:
    """Return the newest readable save in a folder, None if there is none.

    Raises:
        UserError: there are saves, and none can be read.
    """
    problems = []
    for path in _saves(folder):
        try:
            return Save(path, read_run(path))
        except UserError as error:
            problems.append(error)
            _logger.warning("%s: trying the one before", error)
    if problems:
        raise problems[0]
    return None


def read_run(path: Path) -> State:
    """Read what :class:`vim.engine.loop.Loop` saved; nothing in the file is executed.

    Raises:
        UserError: the file is missing, damaged, or not such a checkpoint; or it holds what no checkpoint may hold.
    """
    state = read_checkpoint(path)
    if not {"model", "meta"} <= state.keys() or not isinstance(state["meta"], dict):
        raise UserError(
            f"{path} is not a checkpoint of a run: it lacks 'model' or 'meta' (published weights go with --model NAME)"
        )
    check(state, Run, "", path)
    return state


def read_trained(path: Path) -> State:
    """Read a checkpoint of a classifier; see :func:`read_run`.

    Raises:
        UserError: the file is missing, damaged, or not such a checkpoint.
    """
    state = read_run(path)
    if not {"model", "classes", "eval_transform"} <= state["meta"].keys():
        raise UserError(f"{path} is not a checkpoint of a run: it does not say what model it is of")
    return state


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], source: Path) -> None:
    """Load a state dict into a model of the same architecture.

    Raises:
        UserError: a tensor is missing, unexpected, of another shape or not finite; the error names the first.
    """
    weights = of_now(weights, model)
    check_fit(weights, model, source)
    model.load_state_dict(weights)


def load_published(name: str, path: Path, *, use_ema: bool = False) -> VisionModel:
    """Return a model with published weights and their number of classes, in evaluation mode.

    Args:
        use_ema: load the running average of the weights.

    Raises:
        UserError: no such model, no such file, or the weights do not fit the model.
    """
    checkpoint = read_checkpoint(path)
    model = create_own(name)
    weights = rename(checkpoint, model, path, use_ema=use_ema)
    head = weights.get("head.weight")
    model.reset_classifier(0 if head is None else len(head))
    model.load_state_dict(adapt(weights, model, path))
    return model.eval()


def create_own(name: str, **options: Any) -> OwnModel:
    """Return the model of this package that timm knows by a name.

    Raises:
        UserError: no such model, or a model of timm's own.
    """
    try:
        model = create(name, **options)
    except UserError:
        raise
    except Exception as error:  # timm and the models raise many kinds
        raise UserError(f"cannot build {name}: {describe(error)}") from error
    if not type(model).__module__.startswith("vim."):
        raise UserError(f"{name} is timm's: expected a model of this package, such as vim_tiny")
    return cast(OwnModel, model)


def save_for_timm(model: nn.Module, folder: Path, classes: list[str] | None, transform: Section) -> None:
    """Write model.safetensors and config.json: timm loads local-dir:FOLDER, and transformers loads FOLDER.

    Args:
        classes: names in the order of the model's outputs.
        transform: options of the evaluation transform that differ from the model's.

    Raises:
        UserError: the folder cannot be written to.
    """
    make_folder(folder)
    with naming(folder), TemporaryDirectory(dir=folder) as scratch:  # each file whole, or not there
        config = {"label_names": classes} if classes else None
        save_for_hf(model, scratch, model_config=config, data_config=transform or None, safe_serialization=True)
        _leave_out_classes(Path(scratch, "config.json"))
        for path in Path(scratch).iterdir():
            path.replace(folder / path.name)


def _leave_out_classes(path: Path) -> None:
    """Take `num_classes` out of a config's `model_args`: transformers passes the config's own one to timm too."""
    config = json.loads(path.read_text())
    config["model_args"].pop("num_classes", None)
    path.write_text(json.dumps(config, indent=2))


def load_trained(path: Path) -> tuple[VisionModel, State]:
    """Return the model of a checkpoint, in evaluation mode, and the checkpoint.

    Raises:
        UserError: the checkpoint cannot be read, or names a model that does not exist or fit, or a transform that the
            model's images cannot have.
    """
    state = read_trained(path)
    options = dict(state["meta"]["model"])
    name = str(options.pop("model_name", ""))
    with building(path):
        check_name(name)
        check_options(class_of(name), options, own=is_own(name))
    model = cast(VisionModel, rebuild(lambda: timm.create_model(name, **options), state["model"], path))
    for key in ("classes", "thresholds"):
        values = state["meta"].get(key)
        if values is not None and len(values) != model.num_classes:
            raise UserError(f"{path} is of {model.num_classes} classes, and its {key} are of others: it is damaged")
    if (state["meta"].get("task") == "multilabel") != ("thresholds" in state["meta"]):
        raise UserError(f"{path} has a task and thresholds that do not fit one another: it is damaged")
    read(TransformOptions, "meta.eval_transform", state["meta"]["eval_transform"], str(path))
    with building(path, "a transform"):
        make_transform("eval_transform", model, state["meta"]["eval_transform"])
    return model.eval(), state
