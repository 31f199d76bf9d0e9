"""Transforms of images or clips that fit a model: tried on an image before they are used."""

from collections.abc import Callable, Mapping
from typing import Any

from PIL import Image
from torch import Tensor, nn

from vim.data.transforms import eval_transform, image_mode, input_options, input_shape, num_frames, train_transform
from vim.data.video.transforms import video_eval_transform, video_train_transform

MOST_PIXELS = 2**22  # of an image, before it is cropped
# the makers of transforms: for images, and for clips
TRANSFORMS: dict[tuple[str, bool], Callable[..., Callable[[Any], Tensor]]] = {
    ("train_transform", False): train_transform,
    ("train_transform", True): video_train_transform,
    ("eval_transform", False): eval_transform,
    ("eval_transform", True): video_eval_transform,
}


def make_transform(section: str, model: nn.Module, options: Mapping[str, Any]) -> Callable[[Any], Tensor]:
    """Return a transform of an image, or of the frames of a clip.

    Args:
        section: "train_transform" or "eval_transform".
        options: of :func:`timm.data.create_transform`, in place of the model's.

    Raises:
        ValueError: its images are not in the size and channels of the model, too large, or not finite.
        Exception: timm raises many kinds for options that do not fit.
    """
    frames, (channels, *_, height, width) = num_frames(model), input_shape(model)
    size = _size(options.get("input_size") or (height, width))
    wanted = options.get("input_size")
    if isinstance(wanted, list | tuple) and len(wanted) == 3 and wanted[0] != channels:
        raise ValueError(f"it makes images of {wanted[0]} channels, and the model takes {channels}")
    if size != (height, width):
        raise ValueError(f"it makes images of {size} pixels, and the model takes {(height, width)}")
    share = options.get("crop_pct") or input_options(model)["crop_pct"]
    if not height * width <= MOST_PIXELS * share**2:
        raise ValueError(f"images of {size} pixels with crop_pct {share} are resized to more than {MOST_PIXELS} pixels")
    transform = TRANSFORMS[section, frames is not None](model, options)
    image: Any = Image.new(image_mode(model), (40, 30))
    made = transform([image] if frames else image)
    if made.shape != (channels, *[1] * (frames is not None), height, width):
        raise ValueError(f"it makes images of {tuple(made.shape)}, and the model takes {input_shape(model)}")
    if not made.is_floating_point() or not made.isfinite().all():
        raise ValueError(f"it makes images of {made.dtype} whose values are not all finite: normalised ones expected")
    return transform


def _size(size: Any) -> tuple[int, int]:
    """The height and width that timm makes of an `input_size`."""
    return (size, size) if isinstance(size, int) else tuple(size)[-2:]
