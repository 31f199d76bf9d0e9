"""Grad-CAM of the grad-cam package, with `tokens_to_map` as its `reshape_transform`: a signal is found where it is."""

import pytest
import timm
import torch
from torch import nn

import vim  # noqa: F401  registers the models
from vim.layers import ResidualStack

gradcam = pytest.importorskip("pytorch_grad_cam", reason="grad-cam is not installed")
TOKENS = [
    *(("test_vim", {"class_token": place}) for place in ("middle", "first", "ends", "none")),
    ("test_vim_ssd", {}),
    ("test_videomamba", {}),
    ("test_mambar", {}),
]
STAGED = ("test_vim2", "test_vmamba", "test_mambavision", "test_vssd")


def found(model, layer, row, column):
    """The row and the column, in patches of 16 pixels, of the maximum for a white patch in a black image.

    Whether it speaks for a class or against it is up to chance, so both maps count.
    """
    image = torch.zeros(1, 3, 128, 128)
    image[:, :, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16] = 1
    cam = gradcam.GradCAM(model, [layer], reshape_transform=model.tokens_to_map)
    sum_of_both = sum(cam(image, [lambda logits, sign=sign: sign * logits[0]])[0] for sign in (1, -1))
    assert sum_of_both.shape == (128, 128)
    y, x = divmod(int(sum_of_both.argmax()), 128)
    return y // 16, x // 16


def built(name, **options):
    """A model of whose biases, tables and class tokens none marks a place."""
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=128, global_pool="avg", num_classes=2, **options).eval()
    for key, parameter in model.named_parameters():
        if "pos_embed" in key or "cls_token" in key or key.endswith("bias"):
            nn.init.zeros_(parameter)
    return model


@pytest.mark.parametrize(("name", "options"), TOKENS, ids=str)
@pytest.mark.parametrize("place", [(1, 2), (6, 5)], ids=str)
def test_a_patch_among_tokens(name, options, place):
    model = built(name, **options)
    for layer in model.layers:  # tokens do not mix: each stays the patch it was
        nn.init.zeros_(layer.mixer.out_proj.weight)
    assert found(model, model.layers[1], *place) == place


@pytest.mark.parametrize("name", STAGED)
@pytest.mark.parametrize("place", [(1, 2), (6, 5)], ids=str)
def test_a_patch_in_a_stage(name, place):
    """In the third stage, whose maps have a stride of 16; MambaVision's layers run on four windows there."""
    model = built(name)
    for stage in model.stages:
        stage.layers = ResidualStack(nn.Identity())
    row, column = found(model, model.stages[2].layers, *place)
    assert abs(row - place[0]) <= 1 and abs(column - place[1]) <= 1  # convolutions before it reach into neighbours
