"""Preparing clips for a model: timm's transforms of images, with the same random choices for all frames."""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.random_erasing import RandomErasing
from torch import Tensor, nn

from vim.data.transforms import eval_transform, train_transform


class Alike:
    """Apply a transform to all frames of a clip with the same random choices, then erase the same places in all.

    Args:
        transform: turns a PIL image into a tensor (c, h, w).
        erase: changes a tensor (c, h, w) in place; the pixels it fills in may differ between frames.
    """

    def __init__(
        self, transform: Callable[[Image.Image], Tensor], erase: Callable[[Tensor], object] | None = None
    ) -> None:
        self.transform, self.erase = transform, erase

    def __call__(self, frames: Sequence[Image.Image]) -> Tensor:
        """Turn t PIL images into a tensor (c, t, h, w)."""
        states = random.getstate(), np.random.get_state(), torch.get_rng_state()
        clip = []
        for frame in frames:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.set_rng_state(states[2])
            clip.append(self.transform(frame))
        stacked = torch.stack(clip, dim=1)
        if self.erase is not None:
            self.erase(stacked.flatten(0, 1))  # a view with all frames as channels of one image
        return stacked


def video_train_transform(model: nn.Module, options: Mapping[str, Any]) -> Alike:
    """The transform of clips in training: :func:`vim.data.train_transform`, alike for all frames.

    Frames are cropped before they are augmented. The published code augments whole frames: this changes little, and
    takes longer the larger they are.

    Args:
        options: those of :func:`timm.data.create_transform`.
    """
    names = {"re_prob": "probability", "re_mode": "mode", "re_count": "max_count"}
    of_erasing = {names[name]: value for name, value in options.items() if name in names}
    transform = train_transform(model, {name: value for name, value in options.items() if name not in names})
    erase = RandomErasing(**of_erasing, device="cpu") if of_erasing.get("probability") else None
    return Alike(transform, erase)


def video_eval_transform(model: nn.Module, options: Mapping[str, Any]) -> Alike:
    """The transform of clips in evaluation: :func:`vim.data.eval_transform` for each frame."""
    return Alike(eval_transform(model, dict(options)))
