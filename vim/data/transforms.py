"""How timm is to prepare images for a model."""

from collections.abc import Callable
from typing import Any

from timm.data import create_transform, resolve_data_config

from vim.errors import UserError

_OF_TRANSFORMS = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")


def input_options(model: Any) -> dict[str, Any]:
    """The options of :func:`timm.data.create_loader` and `create_transform` that follow from the model."""
    config = resolve_data_config({}, pretrained_cfg=model.pretrained_cfg)
    options = {name: config[name] for name in _OF_TRANSFORMS}
    options["input_size"] = (model.in_chans, *model.patch_embed.img_size)
    for name in ("mean", "std"):
        if len(options[name]) != model.in_chans:  # grey images: the mean of the colours
            options[name] = (sum(options[name]) / len(options[name]),) * model.in_chans
    return options


def num_frames(model: Any) -> int | None:
    """How many frames the clips have that a model takes; None for a model of images."""
    return getattr(getattr(model, "patch_embed", None), "num_frames", None)


def input_shape(model: Any) -> tuple[int, ...]:
    """Of what a model takes, without the batch: (c, h, w), or (c, t, h, w)."""
    channels, *size = input_options(model)["input_size"]
    frames = num_frames(model)
    return (channels, frames, *size) if frames else (channels, *size)


def eval_transform(model: Any, options: dict[str, Any]) -> Callable[[Any], Any]:
    """A PIL image to a tensor (c, h, w): resize, centre crop, normalise."""
    return create_transform(**{**input_options(model), **options})


def train_transform(model: Any, options: dict[str, Any]) -> Callable[[Any], Any]:
    """A PIL image to a tensor (c, h, w): what :func:`timm.data.create_transform` does in training."""
    options = {**input_options(model), **options}
    crop = ("crop_pct", "crop_mode")  # of evaluation
    return create_transform(**{k: v for k, v in options.items() if k not in crop}, is_training=True)


def image_mode(model: Any) -> str:
    """PIL's name for the images a model takes.

    Raises:
        UserError: images are grey or in colour, and it takes neither.
    """
    if model.in_chans not in (1, 3):
        raise UserError(f"images have 1 or 3 channels, and the model {model.in_chans}: --cfg-options model.in_chans=3")
    return "L" if model.in_chans == 1 else "RGB"
