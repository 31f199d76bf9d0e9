import numpy as np
import pytest

from tests.tiny import image_data
from vim.data import Digits, build_datasets

FIRST_HELD_OUT = [7, 6, 3, 7, 7, 3, 2, 8, 9, 3]


@pytest.fixture(scope="module")
def parts():
    return Digits(train=True), Digits(train=False)


def contents(digits):
    return [np.asarray(image).tobytes() for image in digits.images]


def test_all_are_there(parts):
    train, held_out = parts
    assert len(train) + len(held_out) == 1797
    assert len(held_out) == 360
    assert train.classes == held_out.classes == list("0123456789")


def test_the_parts_are_disjoint(parts):
    train, held_out = map(contents, parts)
    assert not set(train) & set(held_out)
    assert len({*train, *held_out}) == 1797


def test_the_split_is_fixed(parts):
    for part, train in zip(parts, (True, False), strict=True):
        again = Digits(train=train)
        assert contents(again) == contents(part)
        assert again.labels == part.labels
    assert parts[1].labels[:10] == FIRST_HELD_OUT


def test_every_class_has_its_share(parts):
    counts = [np.bincount(part.labels, minlength=10) for part in parts]
    np.testing.assert_allclose(counts[1], 0.2 * (counts[0] + counts[1]), atol=1)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_an_item(mode):
    image, label = Digits(train=False, mode=mode)[3]
    assert (image.mode, image.size) == (mode, (8, 8))
    assert isinstance(label, int)
    assert np.asarray(image).max() == 255


@pytest.mark.parametrize("name, counts, size", [("digits", (1437, 360), (8, 8)), ("mnist5k", (4000, 1000), (28, 28))])
def test_the_built_in_data_sets(name, counts, size):
    splits = build_datasets(image_data({"dataset": name}), "L")
    assert (len(splits.train), len(splits.held_out)) == counts
    assert splits.classes == list("0123456789")
    assert splits.held_out[0][0].size == size
    assert np.asarray(splits.held_out[0][0]).max() > 200
