import random

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import vim  # noqa: F401  registers the models
from vim.data import video_eval_transform, video_train_transform

AUGMENTED = {"auto_augment": "rand-m7-n4-mstd0.5-inc1", "color_jitter": 0.4, "re_prob": 1.0, "re_mode": "pixel"}


def model_of(**options):
    return timm.create_model("test_videomamba", img_size=32, num_frames=4, **options)


def noise(size=(50, 40), mode="RGB"):
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((size[0] // 4, size[1] // 4)).resize(size).convert(mode)


@pytest.mark.parametrize("in_chans, mode", [(3, "RGB"), (1, "L")])
def test_frames_are_transformed_alike(in_chans, mode):
    options = AUGMENTED if in_chans == 3 else {"hflip": 0.5}
    transform = video_train_transform(model_of(in_chans=in_chans), {**options, "re_prob": 0.0})
    random.seed(0)
    clips = [transform([noise(mode=mode)] * 4) for _ in range(8)]
    assert clips[0].shape == (in_chans, 4, 32, 32)
    assert all(torch.equal(clip[:, :1].expand_as(clip), clip) for clip in clips)
    assert len({float(clip.sum()) for clip in clips}) == 8


def test_erasing_is_in_one_place_of_all_frames():
    model = model_of()
    plain = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0), "hflip": 0.0, "color_jitter": 0.0}
    frames = [noise((32, 32))] * 4
    clean = video_train_transform(model, plain)(frames)
    erased = video_train_transform(model, {**plain, "re_prob": 1.0, "re_mode": "pixel"})(frames)
    changed = (clean != erased).any(0)
    assert 0 < changed.float().mean() < 0.5
    assert all(torch.equal(frame, changed[0]) for frame in changed)
    assert not torch.equal(erased[:, 0], erased[:, 1])


def test_a_clip_of_evaluation():
    transform = video_eval_transform(model_of(), {"crop_pct": 1.0})
    clip = transform([noise(), noise((40, 50)), noise(), noise()])
    assert clip.shape == (3, 4, 32, 32)
    assert torch.equal(clip[:, 0], clip[:, 2])
    with pytest.raises(TypeError):
        video_train_transform(model_of(), {"re_probability": 0.5})
