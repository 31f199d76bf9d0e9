import json
import zlib
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import vim  # noqa: F401
from tests.explain.test_attention import FAMILIES, INPUT, family, golden_mixer
from tests.golden.weights import generate
from vim.errors import UserError
from vim.explain import METHODS, explain, implicit_attention, layer_maps
from vim.explain.relevance import RelevanceRules
from vim.layers import RMSNorm


def noise(name, shape):
    return generate(zlib.crc32(name.encode()), shape).double()


GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "explain.json").read_text())["mamba_lrp"]["cases"]


@pytest.mark.parametrize("case", GOLDEN)
def test_golden_relevance(case):
    mixer, norm = golden_mixer(), RMSNorm(16).double()
    norm.weight.data.copy_(1 + 0.1 * noise("lrp.norm", (16,)))
    if case.endswith("no_bias"):
        for convolution in (mixer.conv1d, mixer.conv1d_b):
            nn.init.zeros_(convolution.bias)
    for module in (mixer, norm):
        module.requires_grad_(False)

    def score(x):
        for _ in range(2):
            x = x + mixer(norm(x))
        return norm(x)[0, 5] @ (noise("lrp.head", (16,)) / 4)

    x = INPUT.clone().requires_grad_()
    if case.startswith("rules"):
        with RelevanceRules():
            y = score(x)
    else:
        y = score(x)
    y.backward()
    assert y.item() == pytest.approx(GOLDEN[case]["output"], rel=1e-7)
    want = torch.tensor(GOLDEN[case]["relevance"]).double()
    torch.testing.assert_close((x * x.grad).sum(-1)[0], want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", [*FAMILIES, "test_mambavision", "test_vssd", "test_vit"])
def test_relevance_sums_to_the_score_and_outputs_stay(name):
    model = timm.create_model(name, num_classes=5).double().eval().requires_grad_(False)
    for key, parameter in model.named_parameters():
        if key.endswith("bias") and "dt_" not in key:
            nn.init.zeros_(parameter)
    blocks = model.blocks if isinstance(model.blocks, nn.ModuleList | nn.Sequential) else getattr(model, model.blocks)
    kept = []
    blocks[0].register_forward_pre_hook(lambda _, arguments: kept.append(arguments[0].requires_grad_()))
    images = torch.randn(1, *model.pretrained_cfg["input_size"], dtype=torch.float64)
    with RelevanceRules():
        logits = model(images)
    torch.testing.assert_close(logits, model(images), rtol=1e-9, atol=1e-12)
    (gradient,) = torch.autograd.grad(logits[0, 3], kept[0])
    assert (gradient * kept[0]).sum().item() == pytest.approx(logits[0, 3].item(), rel=1e-8)


@pytest.mark.parametrize("name", FAMILIES)
def test_maps_have_the_size_of_the_image_and_the_model_stays_as_it_was(name):
    model, images = family(name)
    model.train()
    model.head.weight.requires_grad_(False)
    for method in METHODS:
        found = explain(model, images, torch.tensor([0, 4]), method)
        assert found.shape == (2, *images.shape[2:]) and found.isfinite().all() and found.std() > 0
        assert not found.requires_grad
    with pytest.raises(UserError, match="target must be a class from 0 to 4, got 5"):
        explain(model, images, 5)
    assert all(module.training for module in model.modules())
    assert {key for key, p in model.named_parameters() if not p.requires_grad} == {"head.weight"}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("direction", ["forward", "backward", "both"])
def test_the_row_of_a_token_is_that_of_the_matrix(name, direction):
    model, images = family(name)
    matrix = implicit_attention(model, images, [0], direction, reduce="none")[0]
    l, staged = matrix.shape[-1], model.blocks == "stages"
    shape = (round(l**0.5), round(l**0.5), 1) if staged else (l, 1)
    place = int(model.tokens_to_map(torch.arange(l).view(1, *shape))[0, 0, 1, 1])
    rows = matrix[:, :, place].transpose(1, 2)
    low, high = rows.amin((1, 2), keepdim=True), rows.amax((1, 2), keepdim=True)
    want = model.tokens_to_map(((rows - low) / (high - low)).mean(2).view(2, *shape))
    want = nn.functional.interpolate(want, size=images.shape[2:], mode="bilinear").squeeze(1)
    torch.testing.assert_close(layer_maps(model, images, [0], direction, (1, 1))[0], want)


def test_no_such_token():
    model, images = family("test_vim")
    with pytest.raises(UserError, match="token must be in a map of 4 x 4, got 4,0"):
        layer_maps(model, images, token=(4, 0))
