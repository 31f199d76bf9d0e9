import random

import pytest

from vim.data.video.sampling import SAMPLINGS, View, dense, something, sparse, windows


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("count", [1, 3, 8, 17, 300])
def test_samplings_stay_within_a_video(sampling, count):
    for view in [None, View(0, 1), *(View(i, 4) for i in range(4))]:
        for _ in range(20 if view is None else 1):
            chosen = SAMPLINGS[sampling](count, 8, view)
            assert len(chosen) == 8
            assert min(chosen) >= 0 and max(chosen) < count
            assert sampling == "shuffled" or chosen == sorted(chosen)


def test_the_published_views():
    # as VideoMamba's code gives them for 100 frames
    assert sparse(100, 4, View(0, 1)) == [12, 37, 62, 86]
    assert sparse(100, 4, View(2, 4)) == [14, 39, 64, 88]
    assert something(100, 4, View(0, 1)) == [12, 37, 62, 87]
    assert something(100, 4, View(0, 2)) == [0, 25, 50, 75]
    assert something(100, 4, View(1, 2)) == [12, 37, 62, 87]
    assert dense(100, 4, View(0, 1)) == [42, 46, 50, 54]
    assert [dense(100, 4, View(i, 3))[0] for i in range(3)] == [0, 42, 84]


@pytest.mark.parametrize("sampling, last", [(sparse, 29), (something, 27), (dense, 26)])
def test_training_sees_every_frame(sampling, last):
    random.seed(0)
    assert {index for _ in range(300) for index in sampling(30, 4, None)} == set(range(last + 1))


def test_shuffled_is_sparse_in_random_order():
    random.seed(0)
    clips = [SAMPLINGS["shuffled"](100, 4, View(0, 1)) for _ in range(20)]
    assert {tuple(sorted(clip)) for clip in clips} == {(12, 37, 62, 86)}
    assert len({tuple(clip) for clip in clips}) > 10


def test_windows_of_long_videos():
    assert windows(45) == [(0, 45)]
    assert windows(60) == [(0, 60), (16, 60)]
    assert windows(95) == [(0, 60), (16, 76), (32, 92), (48, 95), (64, 95)]
