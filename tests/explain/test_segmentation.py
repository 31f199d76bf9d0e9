import json
import zlib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.golden.weights import generate
from vim.errors import UserError
from vim.explain import segmentation_scores

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "explain.json").read_text())["xai_protocol"]


def golden():
    coarse = generate(zlib.crc32(b"xai.map"), (1, 1, 14, 14)).double()
    squares = torch.arange(224).square()
    mask = squares.view(-1, 1) + squares < 150**2
    return F.interpolate(coarse, scale_factor=16, mode="bilinear", align_corners=False)[0], mask.unsqueeze(0)


def test_golden_scores():
    found = segmentation_scores(*golden())
    assert found.pixel_accuracy == pytest.approx(GOLDEN["pixel_accuracy"], abs=1e-8)
    assert found.mean_iou == pytest.approx(GOLDEN["mIoU"], abs=1e-8)
    assert found.average_precision == pytest.approx(GOLDEN["average_precision_min_max_map"], abs=1e-8)


def test_scores_are_of_the_set_of_images():
    maps, mask = golden()
    empty = torch.zeros_like(mask)
    alone, other = segmentation_scores(maps, mask), segmentation_scores(100 * maps.flip(1), empty)
    found = segmentation_scores(torch.cat([maps, 100 * maps.flip(1)]), torch.cat([mask, empty]))
    assert found.pixel_accuracy == pytest.approx((alone.pixel_accuracy + other.pixel_accuracy) / 2)
    assert found.average_precision == pytest.approx((alone.average_precision + other.average_precision) / 2)
    assert found.mean_iou < alone.mean_iou  # more false objects, summed before the division


def test_best_and_worst_map():
    mask = torch.zeros(2, 3, 8, 8, dtype=torch.bool)  # clips
    mask[..., :4] = True
    assert segmentation_scores(mask.float() - 5, mask) == pytest.approx((1, 1, 1))
    worst = segmentation_scores(-mask.float(), mask)
    assert worst[:2] == (0, 0) and worst.average_precision < 0.51
    assert segmentation_scores(torch.ones(mask.shape), mask).pixel_accuracy == 0.5


@pytest.mark.parametrize("shape", [(1, 8, 9), (2, 8, 8), (0, 8, 8)])
def test_a_mask_for_each_map(shape):
    maps = torch.zeros(1, 8, 8) if shape[0] else torch.zeros(shape)
    with pytest.raises(UserError, match="a mask for each map is needed"):
        segmentation_scores(maps, torch.zeros(shape))
