import numpy as np
import pytest
import timm
import torch
from PIL import Image

import vim  # noqa: F401  registers the models
from vim.data import eval_transform, image_mode, input_options, input_shape, train_transform
from vim.data.transforms import num_frames
from vim.errors import UserError

CLIPS = {"num_frames": 4, "img_size": 32}
MODELS = {  # name, options, and the size in the model's options or its tag
    "convolutions": ("resnet10t", {}, (176, 176)),
    "convolutions, tiny": ("test_resnet", {}, (160, 160)),
    "timm's transformer": ("test_vit", {"img_size": (96, 64)}, (96, 64)),
    "another tag": ("resnet10t", {"pretrained_cfg_overlay": {"input_size": (3, 32, 48)}}, (32, 48)),
    "vim": ("test_vim", {"img_size": (32, 48)}, (32, 48)),
    "vim, of its tag": ("test_vim", {}, (64, 64)),
    "vim2": ("test_vim2", {"img_size": (40, 28)}, (40, 28)),
    "videomamba": ("test_videomamba", CLIPS, (32, 32)),
}
COLOURS = (0.485, 0.456, 0.406)  # ImageNet's mean


def build(name, **more):
    model, options, size = MODELS[name]
    return timm.create_model(model, **options, **more), size


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("channels", "mode"), [(3, "RGB"), (1, "L")])
def test_what_a_model_takes(name, channels, mode):
    model, size = build(name, in_chans=channels)
    frames = (4,) if name == "videomamba" else ()
    assert image_mode(model) == mode
    assert input_options(model)["input_size"] == (channels, *size)
    assert input_shape(model) == (channels, *frames, *size)
    assert num_frames(model) == (4 if frames else None)
    assert model.eval()(torch.zeros(1, *input_shape(model))).shape[0] == 1
    for transform in (eval_transform(model, {}), train_transform(model, {})):
        assert transform(Image.new(mode, (40, 30))).shape == (channels, *size)


@pytest.mark.parametrize("name", ["resnet10t", "test_vim"])
def test_images_are_normalised_with_the_tags_mean(name):
    colour = timm.create_model(name)
    black = eval_transform(colour, {})(Image.new("RGB", (40, 30)))
    want = -torch.tensor(COLOURS) / torch.tensor((0.229, 0.224, 0.225))
    torch.testing.assert_close(black.mean((1, 2)), want)
    grey = timm.create_model(name, in_chans=1)  # the mean of the colours
    black = eval_transform(grey, {})(Image.new("L", (40, 30)))
    torch.testing.assert_close(black.mean((1, 2)), torch.tensor([-sum(COLOURS) / (0.229 + 0.224 + 0.225)]))


@pytest.mark.parametrize("name", ["vim", "vim2", "videomamba", "timm's transformer"])
def test_another_size_from_now_on(name):
    model, _ = build(name)
    model.set_input_size(img_size=(64, 96))
    assert input_shape(model)[-2:] == (64, 96)
    if name == "videomamba":
        model.set_input_size(num_frames=8)
        assert input_shape(model) == (3, 8, 64, 96)


def test_options_go_before_the_models():
    model, image = timm.create_model("resnet10t"), Image.new("RGB", (400, 300), (255, 255, 255))
    assert eval_transform(model, {"input_size": (3, 32, 32)})(image).shape == (3, 32, 32)
    options = {"input_size": (3, 24, 24), "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "no_aug": True}
    assert torch.equal(train_transform(model, options)(image), torch.ones(3, 24, 24))


def test_evaluation_crops_the_tags_share_of_the_image():
    """A frame of 1/8 around a square picture: a crop of 0.875 leaves half of it out, one of 1 nothing."""
    pixels = np.full((224, 224), 255, dtype=np.uint8)
    pixels[14:-14, 14:-14] = 0
    image = Image.fromarray(pixels)
    plain = {"input_size": (1, 224, 224), "mean": (0.0,), "std": (1.0,)}
    model = timm.create_model("test_vim", in_chans=1)
    assert input_options(model)["crop_pct"] == 0.875
    assert eval_transform(model, plain)(image).mean() < 0.03
    whole = eval_transform(model, {**plain, "crop_pct": 1.0})(image)
    assert whole.mean() == pytest.approx(1 - 0.875**2, abs=1e-3)


def test_other_channels_than_images_have():
    with pytest.raises(UserError, match="images have 1 or 3 channels, and the model 4: --cfg-options model.in_chans=3"):
        image_mode(timm.create_model("resnet10t", in_chans=4))
    assert input_options(timm.create_model("resnet10t", in_chans=4))["mean"] == (sum(COLOURS) / 3,) * 4


def test_every_magnitude_of_timms_augmentation():
    from timm.data.auto_augment import rand_augment_ops

    image = Image.new("RGB", (8, 8), (200, 100, 50))
    for magnitude in range(11):
        for op in rand_augment_ops(magnitude, prob=1.0, hparams={}):
            op(image)
