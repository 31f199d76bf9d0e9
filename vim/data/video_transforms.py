"""How timm is to prepare videos for a model: each frame as an image, and all frames of a video alike."""

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from vim.data.transforms import eval_transform, train_transform


class Alike:
    """A transform of images, with the same random choices for all frames; then erasing, the same place in each.

    Args:
        transform: a PIL image to a tensor (c, h, w).
        erase: changes tensors (c, h, w) in place; what it fills in may differ from frame to frame.

    Calling it makes a list of t PIL images a tensor (c, t, h, w).
    """

    def __init__(self, transform: Callable[[Any], Tensor], erase: Callable[[Tensor], Any] | None = None) -> None:
        self.transform, self.erase = transform, erase

    def __call__(self, frames: Sequence[Any]) -> Tensor:
        states = random.getstate(), np.random.get_state(), torch.get_rng_state()
        clip = []
        for frame in frames:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.set_rng_state(states[2])
            clip.append(self.transform(frame))
        stacked = torch.stack(clip, dim=1)
        if self.erase is not None:
            self.erase(stacked.flatten(0, 1))  # a view: frames are channels of one image
        return stacked


def video_train_transform(model: Any, options: dict[str, Any]) -> Alike:
    """A list of t PIL images to a tensor (c, t, h, w): what :func:`vim.data.train_transform` does, to all alike.

    So the options are those of :func:`timm.data.create_transform`. Frames are cropped before they are augmented: the
    published code augments them whole, which changes little and takes the longer the larger they are.
    """
    names = {"re_prob": "probability", "re_mode": "mode", "re_count": "max_count"}
    of_erasing = {names[name]: value for name, value in options.items() if name in names}
    transform = train_transform(model, {name: value for name, value in options.items() if name not in names})
    erase = RandomErasing(**of_erasing, device="cpu") if of_erasing.get("probability") else None
    return Alike(transform, erase)


def video_eval_transform(model: Any, options: dict[str, Any]) -> Alike:
    """A list of t PIL images to a tensor (c, t, h, w): what :func:`vim.data.eval_transform` does to each."""
    return Alike(eval_transform(model, options))
