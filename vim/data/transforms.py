"""How timm prepares images for a model: any of its image models, or of this package's."""

from collections.abc import Callable, Mapping
from typing import Any, TypedDict

from PIL.Image import Image
from PIL.Image import new as new_image
from timm.data import create_transform, resolve_model_data_config
from timm.data.auto_augment import NAME_TO_OP, posterize
from timm.models import get_model_input_config
from torch import Tensor, nn

from vim.errors import UserError


def _posterize(image: Image, bits_to_keep: int, **_: object) -> Image:
    """Posterize as Pillow did before version 13, which refuses the 0 bits that timm's policies can draw."""
    return posterize(image, bits_to_keep) if bits_to_keep > 0 else new_image(image.mode, image.size)


for _name in [name for name, op in NAME_TO_OP.items() if op is posterize]:
    NAME_TO_OP[_name] = _posterize


class InputOptions(TypedDict):
    """Options of :func:`timm.data.create_transform` that follow from a model."""

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float
    crop_mode: str


def input_options(model: nn.Module) -> InputOptions:
    """Return how to prepare images: in the model's present size and channels, otherwise as its weights' tag says."""
    config = resolve_model_data_config(model)
    size: tuple[int, int, int] = get_model_input_config(model)["input_size"]
    return {
        "input_size": size,
        "mean": _for_channels(config["mean"], size[0]),
        "std": _for_channels(config["std"], size[0]),
        "interpolation": config["interpolation"],
        "crop_pct": config["crop_pct"],
        "crop_mode": config["crop_mode"],
    }


def _for_channels(colours: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """Return a figure for each channel; for other images than the tag's, the mean over its colours."""
    return colours if len(colours) == channels else (sum(colours) / len(colours),) * channels


def num_frames(model: nn.Module) -> int | None:
    """Return the number of frames of a model's clips; None for a model of images."""
    return getattr(model, "num_frames", None)


def input_shape(model: nn.Module) -> tuple[int, ...]:
    """Return the shape of a model's input without the batch: (c, h, w), or (c, t, h, w) for clips."""
    channels, *size = input_options(model)["input_size"]
    frames = num_frames(model)
    return (channels, frames, *size) if frames else (channels, *size)


def eval_transform(model: nn.Module, options: Mapping[str, Any]) -> Callable[[Image], Tensor]:
    """Return a transform of a PIL image to a tensor (c, h, w): resize, crop the centre, normalise.

    Args:
        options: of :func:`timm.data.create_transform`, in place of the model's.
    """
    return create_transform(**{**input_options(model), **options})


def train_transform(model: nn.Module, options: Mapping[str, Any]) -> Callable[[Image], Tensor]:
    """Return a transform of a PIL image to a tensor (c, h, w): timm's augmentation for training, normalise.

    Args:
        options: of :func:`timm.data.create_transform`, in place of the model's.
    """
    return create_transform(**{**input_options(model), **options}, is_training=True)


def image_mode(model: nn.Module) -> str:
    """Return PIL's name for the images that a model takes, "L" (grey) or "RGB".

    Raises:
        UserError: the model has neither 1 nor 3 channels.
    """
    channels = input_options(model)["input_size"][0]
    if channels not in (1, 3):
        raise UserError(f"images have 1 or 3 channels, and the model {channels}: --cfg-options model.in_chans=3")
    return "L" if channels == 1 else "RGB"
