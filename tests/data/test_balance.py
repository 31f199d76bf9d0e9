"""Weights of classes and of images, and the order that follows from them."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight

from vim.data import Share
from vim.data.balance import all_labels, class_weights, sampling_weights
from vim.data.loading import EpochBatches
from vim.errors import UserError

RARE = torch.tensor([0] * 90 + [1] * 9 + [2])
SEVERAL = torch.tensor([[1, 0], [1, 1], [1, -1], [0, 0], [1, -1], [0, 0]], dtype=torch.int8)
NAMES = ["cat", "dog", "owl"]


def listing(labels):
    return SimpleNamespace(targets=labels)


def test_balanced_weights_are_those_of_scikit_learn():
    wanted = compute_class_weight("balanced", classes=np.arange(3), y=RARE.numpy())
    assert class_weights(listing(RARE.tolist()), NAMES, "balanced").tolist() == pytest.approx(wanted.tolist())


def test_balanced_weights_of_several_labels_count_what_is_known():
    assert class_weights(listing(SEVERAL), ["a", "b"], "balanced").tolist() == [2 / 4, 3 / 1]


def test_weights_in_numbers():
    stream = object()  # lists no labels
    assert class_weights(stream, NAMES, (1, 2.5, 3)).tolist() == [1, 2.5, 3]
    assert class_weights(stream, NAMES, {"owl": 4}).tolist() == [1, 1, 4]
    assert class_weights(stream, ["0", "1"], {1: 4}).tolist() == [1, 4]


@pytest.mark.parametrize(
    ("labels", "wanted", "message"),
    [
        (None, "balanced", "train.class_weights='balanced' needs a data set that lists its labels"),
        (RARE[:99], "balanced", "no image to train on is of the class 'owl'"),
        (SEVERAL[:, :1].expand(-1, 3).clamp(min=1), "balanced", "all images to train on are 'cat'"),
        (RARE, [1, 2], "has 2 numbers: expected 3, one a class"),
        (RARE, {"fox": 1}, "has 'fox', which is no class: expected cat, dog, owl"),
    ],
)
def test_mistakes(labels, wanted, message):
    with pytest.raises(UserError, match=message):
        class_weights(listing(labels), NAMES, wanted)


def test_each_class_has_the_same_probability():
    weights = sampling_weights(RARE)
    shares = [float(weights[label == RARE].sum() / weights.sum()) for label in range(3)]
    assert shares == pytest.approx([1 / 3] * 3)


def test_an_image_with_several_labels_has_the_weight_of_its_rarest():
    # label 0 four times, label 1 once, none twice
    assert sampling_weights(SEVERAL).tolist() == [1 / 4, 1, 1 / 4, 1 / 2, 1 / 4, 1 / 2]


def epoch(world=1, rank=0, epoch=0, start=0, repeats=1, count=900):
    labels = RARE.repeat_interleave(count // 100)
    batches = EpochBatches(count, 12 // world, 7, Share(rank, world), repeats=repeats, weights=sampling_weights(labels))
    batches.epoch, batches.start = epoch, start
    return labels, [key for batch in batches for key in batch]


def test_the_classes_of_an_epoch_are_balanced():
    labels, keys = epoch()
    assert len(keys) == 900
    counts = Counter(int(labels[key.image]) for key in keys)
    assert all(abs(counts[label] - 300) < 60 for label in range(3))  # four standard deviations


@pytest.mark.parametrize("repeats", [1, 3])
def test_no_two_draws_are_prepared_alike(repeats):
    _, keys = epoch(repeats=repeats)
    assert len(set(keys)) == len(keys)
    most = Counter(key.image for key in keys)
    for image, drawn in most.items():
        assert sorted(key.repeat for key in keys if key.image == image)[0] == 0
        assert max(key.repeat for key in keys if key.image == image) < drawn + repeats


def test_a_balanced_epoch_goes_on_from_its_middle_and_is_shared():
    _, whole = epoch()
    assert epoch(start=40)[1] == whole[40 * 12 :]
    shares = [epoch(world=2, rank=rank)[1] for rank in range(2)]
    assert [key for pair in zip(*shares, strict=True) for key in pair] == whole
    assert epoch(epoch=1)[1] != whole


def test_labels_of_a_data_set_without_a_list():
    with pytest.raises(UserError, match="data.sampling='balanced' needs a data set that lists its labels, such as a"):
        all_labels(object(), "data.sampling='balanced'")
