"""Losses with weights, smoothing and mixed targets, against PyTorch in float64 and by hand."""

import math

import pytest
import torch
import torch.nn.functional as F

from tests.tiny import tiny_recipe
from vim.errors import UserError
from vim.tasks.classification.losses import KnownBinaryCrossEntropy, build_loss, divergence, soft

WEIGHTS = torch.tensor([0.5, 1.0, 4.0], dtype=torch.float64)
MIXUP = {"mixup__mixup_alpha": 0.8, "mixup__mode": "elem"}


def drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["plain", "weighted"])
def test_one_class_an_image(smoothing, weights):
    """The weighted mean of the weighted, smoothed cross-entropy."""
    mixup, criterion = build_loss(tiny_recipe(train__smoothing=smoothing), 3, several=False, weights=weights)
    logits, targets = drawn(6, 3), torch.tensor([0, 2, 1, 1, 0, 2])
    by_class = WEIGHTS if weights is not None else torch.ones(3, dtype=torch.float64)
    smooth = F.one_hot(targets, 3).double() * (1 - smoothing) + smoothing / 3
    losses = -(smooth * by_class * logits.log_softmax(1)).sum(1)
    assert mixup is None
    assert float(criterion(logits, targets)) == pytest.approx(float(losses.sum() / by_class[targets].sum()), rel=1e-12)


def test_one_class_an_image_mixed():
    recipe = tiny_recipe(**MIXUP, train__smoothing=0.1)
    mixup, criterion = build_loss(recipe, 3, several=False, weights=WEIGHTS)
    _, targets = mixup(torch.zeros(6, 1, 4, 4), torch.tensor([0, 2, 1, 1, 0, 2]))
    logits, targets = drawn(6, 3), targets.double()
    assert ((targets > 0.05) & (targets < 0.95)).any()
    assert targets.sum(1).tolist() == pytest.approx([1] * 6)
    wanted = -(targets * WEIGHTS * logits.log_softmax(1)).sum(1).mean()
    assert float(criterion(logits, targets)) == pytest.approx(float(wanted), rel=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_several_labels(smoothing):
    _, criterion = build_loss(tiny_recipe(train__smoothing=smoothing), 3, several=True, weights=WEIGHTS)
    logits = drawn(2, 3).requires_grad_()
    labels = torch.tensor([[1, -1, 0], [-1, 1, 1]], dtype=torch.int8)
    loss = criterion(logits, soft(labels).double())
    loss.backward()
    total = 0.0
    for row, own in zip(logits.tolist(), labels.tolist(), strict=True):
        for logit, label, weight in zip(row, own, WEIGHTS.tolist(), strict=True):
            if label >= 0:
                target = label * (1 - smoothing) + smoothing / 2
                likely = 1 / (1 + math.exp(-logit))
                total -= weight * target * math.log(likely) + (1 - target) * math.log(1 - likely)
    assert float(loss.detach()) == pytest.approx(total / 4, rel=1e-12)
    assert (logits.grad[labels == -1] == 0).all()
    assert (logits.grad[labels != -1] != 0).all()


def test_several_labels_mixed():
    """A mixture with a label that is not known is not known."""
    mixup, criterion = build_loss(tiny_recipe(mixup__mixup_alpha=0.8, train__smoothing=0.2), 3, several=True)
    labels = torch.tensor([[1, -1, 0], [0, 1, 0]], dtype=torch.int8)
    images, targets = mixup(torch.ones(2, 1, 4, 4), soft(labels))
    assert targets.isnan().tolist() == [[False, True, False]] * 2
    assert float(targets[:, 0].sum()) == pytest.approx(1)
    assert targets[:, 2].tolist() == pytest.approx([0.1, 0.1])  # smoothed once
    logits = drawn(2, 3)
    wanted = F.binary_cross_entropy_with_logits(logits[:, [0, 2]], targets[:, [0, 2]].double())
    assert float(criterion(logits, targets.double())) == pytest.approx(float(wanted), rel=1e-12)


def test_no_label_is_known():
    logits = drawn(2, 3).requires_grad_()
    loss = KnownBinaryCrossEntropy()(logits, torch.full((2, 3), torch.nan).double())
    loss.backward()
    assert float(loss.detach()) == float(logits.grad.abs().sum()) == 0


def test_mixing_does_not_fit():
    with pytest.raises(UserError, match="mixup needs an even data.batch_size, got 5"):
        build_loss(tiny_recipe(**MIXUP, data__batch_size=5), 3, several=True)
    with pytest.raises(UserError, match="the config's mixup does not fit: "):
        build_loss(tiny_recipe(**MIXUP | {"mixup__mixup_alpha": 0.0}), 3, several=False)


def test_the_running_average_as_a_teacher():
    """50 times the mean over the images of the sum of q log(q / p), both at a temperature of 3."""
    logits, wanted = (3 * drawn(2, 4, 3)).float()
    p, q = (x.double().div(3).exp() / x.double().div(3).exp().sum(1, keepdim=True) for x in (logits, wanted))
    loss = 50 * (q * (q / p).log()).sum() / 4
    assert float(divergence(logits, wanted)) == pytest.approx(float(loss), rel=1e-5)
