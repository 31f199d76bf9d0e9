"""Whether maps find objects: how well a map separates an object's pixels from the background.

Source of the protocol: https://arxiv.org/abs/2012.09838. Sizes: b images.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from vim.errors import UserError, require


class SegmentationScores(NamedTuple):
    """Scores of a set of images, from 0 to 1, of two classes: object and background.

    Attributes:
        pixel_accuracy: the fraction of pixels on their side of the map's mean.
        mean_iou: intersection over union of each class over all images, the mean of both.
        average_precision: of both classes' pixels together, ranked by the map scaled to 0 to 1; the mean of the images.
    """

    pixel_accuracy: float
    mean_iou: float
    average_precision: float


def segmentation_scores(maps: Tensor, masks: Tensor) -> SegmentationScores:
    """Compare maps with the masks of the objects that they should show.

    Args:
        maps: (b, ..., h, w), as :func:`explain` returns them. What is above an image's mean counts as the object.
        masks: the same shape, true for the object.

    Raises:
        UserError: the shapes differ, there is no image, or scikit-learn is not installed.
    """
    if maps.shape != masks.shape or maps.numel() == 0:
        raise UserError(f"a mask for each map is needed, got {tuple(masks.shape)} for maps {tuple(maps.shape)}")
    maps, masks = maps.flatten(1).double().cpu(), masks.flatten(1).bool().cpu()
    found = maps > maps.mean(1, keepdim=True)
    overlaps = [
        int((guess & truth).sum()) / max(int((guess | truth).sum()), 1)
        for guess, truth in ((found, masks), (~found, ~masks))
    ]
    low, high = maps.amin(1, keepdim=True), maps.amax(1, keepdim=True)
    shares = (maps - low) / (high - low).clamp(min=torch.finfo(maps.dtype).tiny)
    precision = require("sklearn.metrics", "the average precision of maps").average_precision_score
    precisions = [
        precision(torch.cat([~mask, mask]).numpy(), torch.cat([1 - share, share]).numpy())
        for mask, share in zip(masks, shares, strict=True)
    ]
    accuracy = float((found == masks).double().mean())
    return SegmentationScores(accuracy, sum(overlaps) / 2, float(sum(precisions) / len(precisions)))
