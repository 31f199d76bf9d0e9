"""The sections of a recipe as objects: model, loader, optimizer, schedule."""

import inspect
import re
import sys
from collections.abc import Mapping
from dataclasses import fields
from functools import partial
from typing import Any, cast

import timm
import torch
from timm.optim import (
    Lookahead,
    create_optimizer_v2,
    get_optimizer_class,
    list_optimizers,
    param_groups_weight_decay,
)
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.utils.data import DataLoader

from vim.data import Share, create_loader, make_transform, num_frames
from vim.data.balance import all_labels, sampling_weights
from vim.data.loading import Items
from vim.data.streams import Stream
from vim.engine.config import reading
from vim.engine.students import Student
from vim.errors import UserError, closest
from vim.options import ImageData, OptimizerOptions
from vim.registry import create
from vim.typing import VisionModel

LTI_LR = 1e-3  # of the steps and states of time-invariant mixers, as published: larger rates alias their kernels


def build_model(options: Mapping[str, object]) -> VisionModel:
    """Return the timm model that a recipe's `model` section describes.

    Raises:
        UserError: no such model, or an option that it does not take.
    """
    with reading("model"):
        try:
            return cast(VisionModel, create(**options))  # type: ignore[arg-type]
        except TypeError as error:
            raise ValueError(f"{error}{_closest_option(str(options.get('model_name')), str(error))}") from error


def _closest_option(model_name: str, message: str) -> str:
    """Return the closest options of the model's class to the one that Python's message of a TypeError names."""
    found = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", message)
    if not found:
        return ""
    module = sys.modules[timm.model_entrypoint(model_name).__module__]
    return f" {closest(found[2], inspect.signature(getattr(module, found[1], object)).parameters)}"


def build_loader(
    data: ImageData, dataset: Items | Stream, model: VisionModel, share: Share, *, seed: int = 0, is_training: bool
) -> DataLoader[Any]:
    """Return batches of images (b, c, h, w) or clips (b, c, t, h, w), prepared for the model, for one process.

    Raises:
        UserError: an option of the transform does not exist, or a batch is larger than the training set.
    """
    frames = num_frames(model)
    _check_frames(getattr(dataset, "num_frames", None), frames, dynamic=getattr(model, "dynamic_img_size", False))
    section = "train_transform" if is_training else "eval_transform"
    with reading(f"data.{section}"):
        transform = make_transform(section, model, getattr(data, section))
    balanced = is_training and data.sampling == "balanced"
    weights = sampling_weights(all_labels(dataset, "data.sampling='balanced'")) if balanced else None
    return create_loader(
        dataset,
        transform,
        batch_size=data.batch_size,
        num_workers=data.num_workers,
        seed=seed,
        share=share,
        is_training=is_training,
        repeats=data.repeats if is_training else 1,
        samples=data.samples if is_training else 1,
        weights=weights,
    )


def _check_frames(data: int | None, model: int | None, *, dynamic: bool) -> None:
    if data and not model:
        raise UserError(f"the data are videos, and the model is for images: --cfg-options model.num_frames={data}")
    if model and not data:
        raise UserError(f"the data are images, and the model is for clips of {model} frames: take one for images")
    if data != model and not dynamic:
        raise UserError(f"data.video.num_frames is {data}, and model.num_frames {model}: make them equal")


def build_optimizer(student: nn.Module, *, published_decay: bool = False, **options: Any) -> torch.optim.Optimizer:
    """Return timm's optimizer, over timm's groups of parameters or, if `published_decay`, VideoMamba's.

    Raises:
        ValueError: the options do not fit one another or the module.
    """
    _check_optimizer(options)
    if isinstance(student, Student) and options.get("layer_decay"):
        raise ValueError("layer_decay and a teacher do not go together")
    if published_decay:
        if not options.get("layer_decay"):
            raise ValueError("published_decay is a way of layer_decay: set that too, to a number such as 0.75")
        decay = {"layer_decay": options.pop("layer_decay"), "weight_decay": options.get("weight_decay", 0.0)}
        options["param_group_fn"] = partial(published_layer_decay, **decay)
    optimizer = create_optimizer_v2(student, **options)
    _slow_down(optimizer, student)
    if isinstance(optimizer, Lookahead):
        raise ValueError(f"opt must not be {options['opt']!r}, whose slow weights PyTorch does not save")
    if getattr(optimizer, "is_second_order", False):
        raise ValueError(f"opt must not be {options['opt']!r}, which needs second derivatives")
    return optimizer


def _slow_down(optimizer: torch.optim.Optimizer, student: nn.Module) -> None:
    """Move the dynamics of time-invariant mixers to groups with a learning rate of at most :data:`LTI_LR`."""
    slow = {id(p) for module in student.modules() for p in getattr(module, "lti_parameters", dict)().values()}
    for group in list(optimizer.param_groups):
        own = [parameter for parameter in group["params"] if id(parameter) in slow]
        if not own or group["lr"] <= LTI_LR:
            continue
        scale = group.get("lr_scale", 1.0) * LTI_LR / group["lr"]  # timm's schedules multiply the rate by it
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in slow]
        optimizer.add_param_group({**group, "params": own, "lr_scale": scale})


def _check_optimizer(options: Mapping[str, object]) -> None:
    """Raise ValueError if there is no such optimizer, or if it has no such option."""
    name = str(options.get("opt", "sgd")).lower().removeprefix("lookahead_")
    names = [str(one) for one in list_optimizers()]
    if name not in names:
        raise ValueError(f"no such opt: {name} {closest(name, names)}")
    known = [one.name for one in fields(OptimizerOptions)]
    known += inspect.signature(get_optimizer_class(name, bind_defaults=False)).parameters
    for option in options:
        if option not in known:
            raise ValueError(f"{name} has no option {option} {closest(option, known)}")


def published_layer_decay(model: VisionModel, *, layer_decay: float, weight_decay: float) -> list[dict[str, Any]]:
    """Return groups of parameters with the learning rates that VideoMamba's published code has in effect.

    Its layer decay looks for `blocks`, where the model has `layers`: only the parameters before the first block get a
    rate of their own, `layer_decay ** (depth + 1)` times the others' rate, which all but freezes them.
    """
    if not hasattr(model, "layers"):
        raise ValueError(f"published_decay is VideoMamba's, and the model is {type(model).__name__}: leave it out")
    scale = layer_decay ** (len(model.layers) + 1)
    names = ("cls_token", "pos_embed", "patch_embed")
    early = {id(parameter) for name, parameter in model.named_parameters() if name.startswith(names)}
    groups = []
    for group in param_groups_weight_decay(model, weight_decay, no_weight_decay_list=model.no_weight_decay()):
        for first in (True, False):
            own = [parameter for parameter in group["params"] if (id(parameter) in early) == first]
            groups.append({**group, "params": own, "lr_scale": scale if first else 1.0})
    return [group for group in groups if group["params"]]


def build_scheduler(
    optimizer: torch.optim.Optimizer, options: Mapping[str, Any], updates: int
) -> tuple[Scheduler, int]:
    """Return timm's schedule for epochs of so many updates, and the number of epochs with warm-up and cool-down.

    Raises:
        UserError: the options describe no schedule.
    """
    with reading("schedule"):
        scheduler, num_epochs = create_scheduler_v2(optimizer, **options, updates_per_epoch=updates)
        if scheduler is None:
            raise ValueError(f"sched must name a schedule such as 'cosine', got {options.get('sched')!r}")
        scheduler.step(num_epochs - 1)  # raises for options that fit no schedule
        scheduler.step_update((num_epochs - 1) * updates + updates)
    return scheduler, num_epochs
