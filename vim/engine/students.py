"""Modules that are trained together with a model and left out of it afterwards."""

from collections.abc import Mapping
from typing import Any, TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

from vim.typing import VisionModel

PREFIX = "model."  # of the model's own weights in the state of a Student

Value = TypeVar("Value")


class Student(nn.Module):
    """A model as `model`, and what is trained with it and then left out."""

    model: Any

    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters that weight decay must leave alone."""
        return {f"{PREFIX}{name}" for name in self.model.no_weight_decay()}


def own_weights(state: Mapping[str, Value]) -> dict[str, Value]:
    """Return the weights of a :class:`Student`'s model out of the state of the whole."""
    return {key.removeprefix(PREFIX): value for key, value in state.items() if key.startswith(PREFIX)}


class Distilled(Student):
    """A student whose tokens are compared with a teacher's, besides the labels.

    Self-distillation of https://arxiv.org/abs/2403.06977: the teacher is a smaller model of the family, trained before.

    Args:
        model, teacher: models of this package for the same input, cut into the same patches.

    Raises:
        ValueError: their inputs or their numbers of tokens differ.
    """

    def __init__(self, model: VisionModel, teacher: VisionModel) -> None:
        super().__init__()
        own, other = ((m.in_chans, m.num_frames, *m.img_size, m.pos_embed.shape[1]) for m in (model, teacher))
        if own != other:
            raise ValueError(
                f"the teacher's channels, frames, height, width and tokens must be the model's, {own}: got {other}"
            )
        self.model = model
        self.distill_head = nn.Sequential(
            nn.RMSNorm(model.embed_dim, 1e-5), nn.Linear(model.embed_dim, teacher.embed_dim)
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits, and all normed tokens projected to the teacher's width."""
        tokens = self.model.forward_features(images)
        return self.model.forward_head(tokens), self.distill_head(tokens)


def distance(features: Tensor, targets: Tensor) -> Tensor:
    """Return the mean of 2 - 2 cos of the angles between features (..., d) and targets (..., d)."""
    return 2 - 2 * F.cosine_similarity(features.float(), targets.float(), dim=-1).mean()
