import pytest
import torch
from torch import nn

from vim.explain.curves import BASELINES, FRACTIONS, Curve, gradient_times_input, removed


class Bright(nn.Module):
    """Class 1 if the first rows of an image are bright."""

    def forward(self, images):
        mean = images[:, :, :2].mean((1, 2, 3))
        return torch.stack([0.5 - mean, mean - 0.5], 1)


def test_areas_of_a_straight_line():
    curve = Curve([9, 8, 7, 6, 5, 4, 3, 2, 1], 10)
    assert curve.area == pytest.approx(40) and curve.mean == pytest.approx(50)  # published for these accuracies


@pytest.mark.parametrize("shape", [(3, 3, 10, 10), (3, 3, 2, 10, 10)])
def test_the_pixels_removed_are_the_first_of_the_order(shape):
    images, maps = torch.ones(shape), torch.rand(shape[0], *shape[2:])
    black = torch.tensor([-1.0, -2.0, -3.0])
    for order in ("most", "least"):
        found = removed(images, maps, 0.3, order, black)
        gone = found[:, 0] == -1
        assert (gone.flatten(1).sum(1) == round(0.3 * maps[0].numel())).all()
        if order == "most":
            assert maps[gone].min() > maps[~gone].max() or shape[0] > 1
            assert all(maps[i][gone[i]].min() > maps[i][~gone[i]].max() for i in range(3))
        else:
            assert all(maps[i][gone[i]].max() < maps[i][~gone[i]].min() for i in range(3))
        assert (found[:, 2][gone] == -3).all() and (found[:, 2][~gone] == 1).all()


def test_a_map_of_what_the_model_looks_at_falls_first_and_last():
    images, targets = torch.ones(4, 1, 10, 10), torch.ones(4, dtype=torch.long)
    looked_at = torch.zeros(4, 10, 10)
    looked_at[:, :2] = 1
    curves = {}
    for order in ("most", "least"):
        curves[order] = Curve()
        curves[order].add(Bright(), images, targets, looked_at, order, torch.zeros(1))
    assert curves["most"].accuracy == [0.0] * len(FRACTIONS)  # 10 % of the pixels are half of the two rows
    assert curves["least"].accuracy == [1.0] * 8 + [0.0]  # 90 % leaves half of the two rows


def test_baselines():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 5, 7))
    images, targets = torch.randn(2, 3, 4, 5), torch.tensor([6, 2])
    want = (images * model[1].weight[targets].view(2, 3, 4, 5)).sum(1)
    torch.testing.assert_close(BASELINES["gradient"](model, images, targets), want)
    with torch.no_grad():
        torch.testing.assert_close(gradient_times_input(model, images, targets), want)
    maps = BASELINES["random"](model, images.unsqueeze(2).expand(-1, -1, 2, -1, -1), targets)
    assert maps.shape == (2, 2, 4, 5) and maps.flatten().unique().numel() == maps.numel()


def test_images_of_all_batches_count():
    curve = Curve()
    for count in (1, 3):
        images = torch.ones(count, 1, 10, 10)
        curve.add(Bright(), images, torch.ones(count, dtype=torch.long), images[:, 0], "least", torch.zeros(1))
    assert curve.images == 4 and curve.right[0] == 4
