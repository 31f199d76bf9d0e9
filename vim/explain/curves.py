"""Whether maps can be trusted: how a model's accuracy falls as the pixels are removed in the order of a map.

Source of the protocol: https://arxiv.org/abs/2012.09838. Sizes: b images.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

FRACTIONS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
Order = Literal["most", "least"]


@dataclass
class Curve:
    """How many of the images are still classified right, for each of FRACTIONS of the pixels removed."""

    right: list[int] = field(default_factory=lambda: [0] * len(FRACTIONS))
    images: int = 0

    @property
    def accuracy(self) -> list[float]:
        """The fractions of images that are classified right."""
        return [right / max(self.images, 1) for right in self.right]

    @property
    def mean(self) -> float:
        """The mean of the accuracies in %: at most 100."""
        return 100 * sum(self.accuracy) / len(self.accuracy)

    @property
    def area(self) -> float:
        """The area under the curve by the trapezoidal rule, in %: at most 80, since it spans 10 to 90 % of pixels."""
        ends = (self.accuracy[0] + self.accuracy[-1]) / 2
        return 100 * (sum(self.accuracy) - ends) * (FRACTIONS[1] - FRACTIONS[0])

    @torch.no_grad()
    def add(self, model: nn.Module, images: Tensor, targets: Tensor, maps: Tensor, order: Order, black: Tensor) -> None:
        """Count images (b, c, ..., h, w) with classes (b,), with pixels removed in the order of maps (b, ..., h, w)."""
        for i, fraction in enumerate(FRACTIONS):
            logits = model(removed(images, maps, fraction, order, black))
            self.right[i] += int((logits.argmax(1) == targets).sum())
        self.images += len(images)


def removed(images: Tensor, maps: Tensor, fraction: float, order: Order, black: Tensor) -> Tensor:
    """Return the images with a fraction of their pixels black: those that count most, or least.

    Args:
        images: (b, c, ..., h, w), normalised.
        maps: (b, ..., h, w).
        black: (c,), the value of black: -mean / std.
    """
    ranks = maps.flatten(1).argsort(1, descending=order == "most").argsort(1)
    gone = (ranks < fraction * ranks.shape[1]).view_as(maps).unsqueeze(1)
    return torch.where(gone, black.view(1, -1, *[1] * (images.dim() - 2)), images)


def random_map(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
    """Return a map (b, ..., h, w) at random: what any method must beat."""
    return torch.rand(images.shape[0], *images.shape[2:], device=images.device)


def gradient_times_input(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
    """Return the gradient of each image's score times the image, summed over its channels: (b, ..., h, w)."""
    images = images.detach().clone().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(model(images).gather(1, target.unsqueeze(1)).sum(), images)
    return (gradient * images.detach()).sum(1)


BASELINES: dict[str, Callable[[nn.Module, Tensor, Tensor], Tensor]] = {
    "random": random_map,
    "gradient": gradient_times_input,
}
