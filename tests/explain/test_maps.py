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
from vim.explain.recording import recorded
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


@pytest.mark.parametrize("name", ["test_vmamba", "test_vim2", "test_mambavision", "test_vssd"])
def test_relevance_of_pixels_sums_to_the_score(name):
    model, images = timm.create_model(name, num_classes=5).double(), torch.randn(2, 3, 64, 64, dtype=torch.float64)
    for key, parameter in model.named_parameters():
        if key.endswith("bias") and "dt_" not in key:
            nn.init.zeros_(parameter)
    relevance = explain(model, images, torch.tensor([3, 1]))
    want = model.eval()(images)[[0, 1], [3, 1]]
    torch.testing.assert_close(relevance.sum((1, 2)), want, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", ["test_vim", "test_mambar"])
def test_relevance_of_tokens_is_input_times_gradient(name):
    model, images = family(name)
    taken = []
    model.layers[0].register_forward_pre_hook(lambda _, given: taken.append(given[0]))
    found = explain(model, images, 2)
    tokens = taken[0].detach().requires_grad_()
    model.layers[0].register_forward_pre_hook(lambda _, given: (tokens, *given[1:]))
    model.requires_grad_(False)
    with RelevanceRules():
        (gradient,) = torch.autograd.grad(model(images)[:, 2].sum(), tokens)
    want = model.tokens_to_map((tokens * gradient).sum(2, keepdim=True), (64, 64))
    torch.testing.assert_close(
        found, nn.functional.interpolate(want, size=(64, 64), mode="bilinear").squeeze(1).detach()
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_maps_have_the_size_of_the_image_and_the_model_stays_as_it_was(name):
    model, images = family(name, 64)
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


def as_map(model, images, rows, grid=None):
    """The map of rows (b, d, l) of a matrix: each image's is scaled to 0 to 1 before the mean over the channels."""
    low, high = rows.amin((1, 2), keepdim=True), rows.amax((1, 2), keepdim=True)
    tokens = ((rows - low) / (high - low)).mean(1)
    tokens = tokens.unsqueeze(2) if grid is None else tokens.view(-1, *grid, 1)
    found = model.tokens_to_map(tokens, images.shape[2:])
    mode = "trilinear" if images.dim() == 5 else "bilinear"
    return nn.functional.interpolate(found, size=images.shape[2:], mode=mode).squeeze(1)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("direction", ["forward", "backward", "both"])
def test_the_row_of_a_token_is_that_of_the_matrix(name, direction):
    model, images = family(name)
    matrix = implicit_attention(model, images, [0], direction, reduce="none")[0]
    l = matrix.shape[-1]
    grid = (4, 8) if model.blocks == "stages" else None
    numbers = torch.arange(l).view(1, *(grid or (l,)), 1)
    place = int(model.tokens_to_map(numbers)[0, 0, 1, 2])
    want = as_map(model, images, matrix[:, :, place], grid)
    torch.testing.assert_close(layer_maps(model, images, [0], direction, (1, 2))[0], want)


@pytest.mark.parametrize(
    ("name", "options", "size", "places"),
    [
        ("test_vim", {"class_token": "middle"}, (64, 64), [8]),
        ("test_vim", {"class_token": "middle", "dynamic_img_size": True}, (96, 32), [6]),
        ("test_vim", {"class_token": "first"}, (64, 64), [0]),
        ("test_vim", {"class_token": "ends"}, (64, 64), [0, 17]),
        ("test_vim", {"class_token": "none"}, (64, 64), range(16)),
        ("test_vim", {"global_pool": "avg"}, (64, 64), [i for i in range(17) if i != 8]),
        ("test_videomamba", {"num_frames": 2}, (2, 64, 64), [0]),
        ("test_vmamba", {}, (64, 64), range(256)),
    ],
)
def test_raw_is_the_row_of_what_is_pooled(name, options, size, places):
    model = timm.create_model(name, num_classes=5, **options).double()
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    matrix = implicit_attention(model, images, [0], reduce="none")[0]
    grid = (16, 16) if name == "test_vmamba" else None
    want = as_map(model, images, matrix[:, :, list(places)].mean(2), grid)
    torch.testing.assert_close(explain(model, images, method="raw", layers=[0]), want)


def test_registers_are_class_tokens():
    model, images = family("test_mambar")
    matrix = implicit_attention(model, images, [0], reduce="none")[0]
    _, registers = model._split_tokens(torch.arange(matrix.shape[-1]).view(1, -1, 1))
    rows = matrix[:, :, registers.flatten()]
    assert rows.shape[2] > 1
    features = model.forward_features(images).detach().requires_grad_()
    (share,) = torch.autograd.grad(model.pool(features).sum(), features)
    share = share.abs().sum(2)[:, registers.flatten()]
    want = as_map(model, images, torch.einsum("bi,bdij->bdj", share / share.sum(1, keepdim=True), rows))
    torch.testing.assert_close(explain(model, images, method="raw", layers=[0]), want)


def test_a_token_has_its_place_in_the_maps_of_every_stage():
    model, images = family("test_vmamba", 64)
    stages = {one.shape[-1]: i for i, one in enumerate(implicit_attention(model, images))}
    last = max(stages.values())
    matrix = implicit_attention(model, images, [last], reduce="none")[0]
    side = round(matrix.shape[-1] ** 0.5)
    want = as_map(model, images, matrix[:, :, side - 1], (side, side))  # the end of the first row
    torch.testing.assert_close(layer_maps(model, images, [0, last], token=(0, 15))[1], want)


def test_rollout_through_stages_goes_to_the_first_map():
    model, images = family("test_vmamba", (32, 64))
    weights, grid = None, None
    shapes = [one.grid for one in found_in(model, images)]
    matrices = implicit_attention(model, images)
    for (rows, columns), matrix in zip(reversed(shapes), reversed(matrices), strict=True):
        if weights is None:
            weights = torch.full((2, rows * columns), 1 / (rows * columns), dtype=torch.float64)
        elif grid != (rows, columns):  # each token's weight is shared by the four that it came from
            weights = weights.view(2, *grid).repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1) / 4
        grid = (rows, columns)
        step = matrix.clamp(min=0) + torch.eye(rows * columns, dtype=torch.float64)
        weights = torch.einsum("bi,bij->bj", weights, step / step.sum(2, keepdim=True))
    want = nn.functional.interpolate(weights.view(2, 1, 8, 16), size=(32, 64), mode="bilinear").squeeze(1)
    torch.testing.assert_close(explain(model, images, method="rollout"), want)


def found_in(model, images):
    with torch.no_grad(), recorded(model) as found:
        model(images)
    return found


def test_attribution_weights_each_row_with_the_gradient_of_the_gated_output():
    model, images = family("test_vim")
    kept = []
    for layer in model.layers:
        layer.mixer.out_proj.register_forward_pre_hook(lambda _, given: kept.append(given[0]))
    gradients = torch.autograd.grad(model(images)[:, 3].sum(), kept)
    weights = nn.functional.one_hot(torch.tensor([8, 8]), 17).double()
    for matrix, gradient in zip(reversed(implicit_attention(model, images)), reversed(gradients), strict=True):
        step = (matrix * gradient.mean(2).unsqueeze(2)).clamp(min=0) + torch.eye(17, dtype=torch.float64)
        weights = torch.einsum("bi,bij->bj", weights, step / step.sum(2, keepdim=True))
    want = model.tokens_to_map(weights.unsqueeze(2))
    want = nn.functional.interpolate(want, size=(64, 64), mode="bilinear").squeeze(1)
    torch.testing.assert_close(explain(model, images, 3, "attribution"), want)


def test_gradcam_weights_the_features_with_the_gradient():
    model, images = family("test_vim")
    kept = []
    model.norm_f.register_forward_pre_hook(lambda _, given: kept.append(given[0]))
    (gradient,) = torch.autograd.grad(model(images)[:, 3].sum(), kept)
    features = (kept[0] * gradient.mean(1, keepdim=True)).sum(2, keepdim=True)
    want = nn.functional.interpolate(model.tokens_to_map(features).clamp(min=0), size=(64, 64), mode="bilinear")
    torch.testing.assert_close(explain(model, images, 3, "gradcam"), want.squeeze(1).detach())


def test_raw_is_the_mean_of_the_layers():
    model, images = family("test_vim")
    torch.testing.assert_close(explain(model, images, method="raw"), torch.stack(layer_maps(model, images)).mean(0))
    assert len(layer_maps(model, images, [2, 0])) == 2
    for one, other in zip(layer_maps(model, images, [2, 0]), layer_maps(model, images)[::2], strict=True):
        torch.testing.assert_close(one, other)  # in the order of the model


def test_batch_norm_by_the_rules_is_the_layer_itself():
    norm, x = nn.BatchNorm2d(4).double(), torch.randn(2, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        nn.init.uniform_(tensor, 0.5, 2)
    norm.eval()
    with RelevanceRules():
        y = norm(x)
    torch.testing.assert_close(y, norm(x))
    want = torch.autograd.grad(norm(x).square().sum(), x)
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), x), want)


def test_a_convolution_without_activation_has_none_by_the_rules():
    x, taps = torch.randn(1, 1, 5, 3), torch.randn(1, 3, 4)
    with RelevanceRules():
        y = torch.ops.vim.causal_conv1d(x, taps, reverse=[0], silu=False)
    torch.testing.assert_close(y, torch.ops.vim.causal_conv1d(x, taps, reverse=[0], silu=False))


def test_no_such_token():
    model, images = family("test_vim")
    with pytest.raises(UserError, match="token must be in a map of 4 x 4, got 4,0"):
        layer_maps(model, images, token=(4, 0))


@pytest.mark.parametrize("name", ["test_vim", "test_vmamba"])
@pytest.mark.parametrize("method", METHODS)
def test_each_image_has_the_map_that_it_has_alone(name, method):
    model, images = family(name)
    whole = explain(model, images, torch.tensor([1, 3]), method)
    for i, target in enumerate((1, 3)):
        torch.testing.assert_close(whole[i : i + 1], explain(model, images[i : i + 1], target, method))
    torch.testing.assert_close(
        explain(model, images, None, method), explain(model, images, model(images).argmax(1), method)
    )


@pytest.mark.parametrize(
    ("images", "target", "method", "message"),
    [
        (torch.zeros(3, 64, 64), None, "lrp", "images must be normalised, .* got torch.float32 .3, 64, 64."),
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), None, "lrp", "images must be normalised, .* got torch.uint8"),
        (torch.zeros(2, 3, 64, 64), torch.tensor([1, 2, 3]), "lrp", "one for each of 2 images, got .3,."),
        (torch.zeros(2, 3, 64, 64), -1, "lrp", "target must be a class from 0 to 4, got -1"),
        (torch.zeros(2, 3, 64, 64), 1.5, "lrp", "target must be a whole number, got torch.float32"),
        (torch.zeros(2, 3, 64, 64), torch.tensor([True, False]), "lrp", "a whole number, got torch.bool"),
        (torch.zeros(2, 3, 64, 64), None, "gradcamm", "method must be one of .* .the closest: gradcam"),
    ],
)
def test_what_cannot_be_explained(images, target, method, message):
    model = timm.create_model("test_vim", num_classes=5)
    with pytest.raises(UserError, match=message):
        explain(model, images, target, method)


def test_models_that_cannot_be_explained():
    images = torch.zeros(1, 3, 64, 64)
    with pytest.raises(UserError, match="one of this package's models of images or videos, got VisionTransformer"):
        explain(timm.create_model("test_vit", img_size=64), images)
    for options in ({"num_classes": 0}, {"global_pool": ""}):
        with pytest.raises(UserError, match="a model with classes is needed"):
            explain(timm.create_model("test_vim", **options), images)


@pytest.mark.parametrize("name", ["test_vmamba", "test_vim2"])
def test_dilated_stages(name):
    """Their tokens are scanned in parts: there is no matrix of all, but the maps of gradients hold."""
    model = timm.create_model(name, output_stride=16, num_classes=5).double().eval()
    images = torch.randn(2, 3, 40, 72, dtype=torch.float64)
    for call in (implicit_attention, layer_maps, lambda *of: explain(*of, method="rollout")):
        with pytest.raises(UserError, match="dilated stages is not offered: build the model without output_stride, wh"):
            call(model, images)
    for method in ("lrp", "gradcam"):
        maps = explain(model, images, 1, method)
        torch.testing.assert_close(maps[1:], explain(model, images[1:], 1, method))
        assert maps.shape == (2, 40, 72) and maps.any()
