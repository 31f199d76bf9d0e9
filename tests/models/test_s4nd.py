import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.optim import param_groups_weight_decay

import vim  # noqa: F401  registers the models
from vim.layers import S4ND, constant_kernels

TINY = "convnext_s4nd_tiny"
COUNTS = [  # parameters
    ("vit_s4nd_base", {}, 88_786_408),
    (TINY, {"stem": "patch"}, 29_980_456),
    # the published stem has three more, which it does not use
    (TINY, {}, 30_007_057 - 3),
    (TINY, {"downsample": "s4nd"}, 29_409_457 - 3),
]
SMALL = {"embed_dims": (8, 12), "depths": (1, 1), "num_classes": 5}


@pytest.mark.parametrize(("name", "options", "count"), COUNTS, ids=str)
def test_published_sizes(name, options, count):
    model = timm.create_model(name, device="meta", **options)
    assert sum(p.numel() for p in model.parameters()) == count


def seen(model):
    """Scale the branches of ConvNeXt's blocks, which start at 1e-6, so that they are seen in outputs."""
    for name, parameter in model.named_parameters():
        if name.endswith("scale.gamma"):
            torch.nn.init.ones_(parameter)
    return model.double().eval()


def build(name="test_convnext_s4nd", **options):
    torch.manual_seed(0)
    return seen(timm.create_model(name, **({**SMALL, **options} if "convnext" in name else options)))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("test_s4nd", {}),
        ("test_s4nd", {"axes": 2, "kind": "s4"}),
        ("test_convnext_s4nd", {"kind": "s4"}),
        ("test_convnext_s4nd", {"stem": "s4nd", "downsample": "s4nd"}),
        ("test_convnext_s4nd", {"num_frames": 4}),
    ],
    ids=str,
)
def test_each_pixel_reaches_each_place(name, options):
    """And each parameter the output."""
    model = build(name, **options)
    image = torch.randn(1, 3, *([4] if model.num_frames else []), 40, 64, dtype=torch.float64, requires_grad=True)
    x = model.forward_features(image)
    for corner in (x[..., 0, 0], x[..., -1, -1]):
        (gradient,) = torch.autograd.grad(corner.square().sum(), image, retain_graph=True)
        assert (gradient != 0).all()
    model(image).square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters())


@pytest.mark.parametrize("name", ["test_s4nd", "test_convnext_s4nd"])
@torch.no_grad()
def test_images_of_any_size(name):
    """As in a model built for their size, and padded with zeros below and on the right."""
    model, stride = build(name), 16 if name == "test_s4nd" else 4
    image = torch.randn(2, 3, 37, 70, dtype=torch.float64)
    other = build(name, img_size=(37, 70))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(image), model(image))
    padded = torch.nn.functional.pad(image, (0, -70 % stride, 0, -37 % stride))
    torch.testing.assert_close(model(padded), model(image))


@pytest.mark.parametrize("name", ["test_s4nd", "test_convnext_s4nd"])
@torch.no_grad()
def test_another_resolution(name):
    """A rate of 2 doubles all steps; and a narrow band changes what is heard."""
    model, image = build(name), torch.randn(2, 3, 64, 64, dtype=torch.float64)
    double, narrow = build(name, rate=2.0), build(name, rate=2.0, bandlimit=0.05)
    for other in (double, narrow):
        other.load_state_dict(model.state_dict())
    assert (narrow(image) - double(image)).abs().max() > 1e-4
    for key, parameter in model.named_parameters():
        if key.endswith("inv_dt"):
            parameter.add_(torch.log(torch.tensor(2.0, dtype=torch.float64)))
    torch.testing.assert_close(double(image), model(image))


def test_kernels_of_the_stem_keep_their_pixels_at_another_resolution():
    longest = {rate: build(stem="s4nd", rate=rate).patch_embed.mixer.l_max for rate in (0.5, 1.0, 2.0)}
    assert longest == {0.5: 32, 1.0: 16, 2.0: 8}


def test_what_is_decayed():
    """As published: C and D, beside weights, but not the systems' dynamics."""
    for name in ("test_s4nd", "test_convnext_s4nd"):
        model = timm.create_model(name, kind="s4", init="legs")
        names = {id(p): key.rpartition(".")[2] for key, p in model.named_parameters()}
        spared, decayed = param_groups_weight_decay(model, 0.1, no_weight_decay_list=model.no_weight_decay())
        assert {names[id(p)] for p in decayed["params"]} == {"weight", "C", "D"}
        assert {"inv_dt", "A_real", "A_imag", "B", "P", "bias"} <= {names[id(p)] for p in spared["params"]}


# Clips


def test_clips():
    model, clip = build(num_frames=4), torch.randn(2, 3, 4, 37, 70, dtype=torch.float64)
    assert (model.num_frames, build().num_frames) == (4, None)
    features, maps = model.forward_intermediates(clip)
    assert [tuple(x.shape) for x in maps] == [(2, 8, 2, 10, 18), (2, 12, 2, 5, 9)]
    assert torch.equal(features, model.forward_features(clip)) and model(clip).shape == (2, 5)
    assert torch.equal(model.tokens_to_map(maps[0].movedim(1, -1)), maps[0])
    assert torch.equal(model.tokens_to_map(features), features)
    assert model(torch.randn(1, 3, 8, 32, 32, dtype=torch.float64)).shape == (1, 5)
    for wrong in (clip[:, :, :3], clip[:, :, 0], clip[:, :1]):
        with pytest.raises(AssertionError, match=r"clips \(b, 3, t, h, w\) expected, t even"):
            model(wrong)
    for options in ({"num_frames": 3}, {"num_frames": 4, "output_stride": 4}):
        with pytest.raises(ValueError, match="num_frames must be even, and output_stride None for clips, got"):
            build(**options)


@pytest.mark.parametrize("parts", [{}, {"stem": "s4nd", "downsample": "s4nd"}], ids=str)
@torch.no_grad()
def test_a_still_clip_is_its_image(parts, tmp_path):
    """With an image model's weights, where kernels along time leave each frame as it is."""
    images = build(**parts)
    if not parts:
        images.patch_embed.proj.bias.zero_()  # the patch is repeated, which doubles what the norm divides by
    save_file(images.state_dict(), tmp_path / "a.safetensors")
    overlay = {"file": str(tmp_path / "a.safetensors")}
    clips = timm.create_model(
        "test_convnext_s4nd", num_frames=4, **SMALL, **parts, pretrained=True, pretrained_cfg_overlay=overlay
    )
    if not parts:
        for frame in clips.patch_embed.proj.weight.unbind(2):
            assert torch.equal(frame, images.patch_embed.proj.weight.float())
    clips.double().eval()
    for mixer in clips.modules():
        if isinstance(mixer, S4ND):
            time = mixer.kernels[0]
            still = torch.zeros(*time.C.shape[:2], 9, dtype=torch.float64)
            still[: len(still) // 2, :, 0] = 1
            time.forward = lambda l, rate, still=still: still[:, :, :l]
    image = torch.randn(2, 3, 40, 64, dtype=torch.float64)
    clip = image.unsqueeze(2).expand(-1, -1, 4, -1, -1)
    torch.testing.assert_close(clips(clip), images(image), rtol=1e-5, atol=1e-6)


def test_clip_weights_are_loaded_as_they_are(tmp_path):
    model = build(num_frames=4)
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    overlay = {"file": str(tmp_path / "a.safetensors")}
    again = timm.create_model(
        "test_convnext_s4nd", num_frames=2, **SMALL, pretrained=True, pretrained_cfg_overlay=overlay
    )
    assert all(torch.equal(value.float(), again.state_dict()[key]) for key, value in model.state_dict().items())


@torch.no_grad()
def test_constant_kernels():
    """Those of one image size, within the context, whatever happens in it."""
    model, image = build("test_s4nd", kind="s4"), torch.randn(1, 3, 64, 64, dtype=torch.float64)
    want, state = model(image), model.state_dict()
    with pytest.raises(RuntimeError, match="stop"), constant_kernels(model, image):
        assert not [key for key in dict(model.named_parameters()) if ".kernels." in key]
        assert torch.equal(model(image), want)
        raise RuntimeError("stop")
    assert model.state_dict().keys() == state.keys()
    assert model(image[..., :32]).shape == (1, 1000)
