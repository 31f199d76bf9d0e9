"""The losses of classifiers: of one class an image, and of any number of labels."""

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy
from torch import Tensor, nn

from vim.data import IGNORED
from vim.engine.config import reading
from vim.errors import UserError
from vim.options import ImageRecipe


class KnownBinaryCrossEntropy(nn.Module):
    """Binary cross-entropy of logits, averaged over the labels that are known.

    Args:
        smoothing: moves targets towards 0.5.
        pos_weight: (classes,) the weight of an image with the label, relative to one without it.
    """

    def __init__(self, smoothing: float = 0.0, pos_weight: Tensor | None = None) -> None:
        super().__init__()
        self.each = BinaryCrossEntropy(smoothing, pos_weight=pos_weight, reduction="none", smooth_dense=True)

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of logits (b, classes) and targets (b, classes) from 0 to 1, NaN where not known."""
        known = ~targets.isnan()
        losses = self.each(logits, targets.nan_to_num(0.0))
        return torch.where(known, losses, 0.0).sum() / known.sum().clamp(min=1)


def soft(labels: Tensor) -> Tensor:
    """Return labels (b, classes) of 1, 0 and `IGNORED` as targets that can be mixed: NaN where not known."""
    return labels.float().masked_fill(labels == IGNORED, torch.nan)


def divergence(logits: Tensor, wanted: Tensor) -> Tensor:
    """Return 50 KL(wanted || logits) of logits (b, classes) at a temperature of 3, averaged over the images: MESA.

    Source: https://arxiv.org/abs/2205.14083. The factor and the temperature are those of MambaVision's published code.
    """
    log_p, log_q = ((x.float() / 3).log_softmax(1) for x in (logits, wanted))
    return 50 * F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)


def build_loss(
    recipe: ImageRecipe, num_classes: int, *, several: bool, weights: Tensor | None = None
) -> tuple[Mixup | None, nn.Module]:
    """Return what mixes images and targets, if anything does, and the loss.

    One class an image: :class:`torch.nn.CrossEntropyLoss` with its weights and smoothing, which divides by the sum of
    the images' weights, or by the number of images if they are mixed.

    Args:
        several: whether an image may have several labels.
        weights: (num_classes,) of :func:`vim.data.balance.class_weights`.

    Raises:
        UserError: the options of mixup do not fit one another or the batch.
    """
    smoothing, batch_size = recipe.train.smoothing, recipe.data.batch_size
    mixup = None
    if recipe.mixup:
        if batch_size % 2:
            raise UserError(f"mixup needs an even data.batch_size, got {batch_size}")
        with reading("mixup"):
            options = {"label_smoothing": smoothing, "num_classes": num_classes, "multi_label": several}
            mixup = Mixup(**recipe.mixup, **options)
            mixup(torch.zeros(2, 1, 8, 8), torch.zeros(2, num_classes) if several else torch.zeros(2, dtype=torch.long))
        smoothing = 0.0  # its targets are smooth
    if several:
        return mixup, KnownBinaryCrossEntropy(smoothing, weights)
    return mixup, nn.CrossEntropyLoss(weights, label_smoothing=smoothing)
