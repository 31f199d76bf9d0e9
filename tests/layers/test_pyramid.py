import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import vim  # noqa: F401  registers the models
from vim.layers.pyramid import pad_to_patches

ISOTROPIC = ("test_vim", "test_vim_ssd", "test_vim_s4d", "test_videomamba", "test_mambar")


def pyramid(name="test_vim", **options):
    torch.manual_seed(0)
    return timm.create_model(name, **{"features_only": True, "pyramid_channels": 24, **options})


@pytest.mark.parametrize("name", ISOTROPIC)
def test_maps_of_any_size_at_four_strides(name):
    model = pyramid(name)
    assert model.feature_info.reduction() == [4, 8, 16, 32] and model.feature_info.channels() == [24] * 4
    for h, w in ((64, 64), (71, 130), (33, 16), (5, 3)):
        maps = model(torch.randn(2, 3, h, w))
        assert [tuple(x.shape) for x in maps] == [(2, 24, -(-h // s), -(-w // s)) for s in (4, 8, 16, 32)]
    sum(x.square().mean() for x in model(torch.randn(2, 3, 71, 130))).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.any(), key


def test_the_layers_are_the_papers():
    """Of the normed map after the last block, with each level written out."""
    model, image = pyramid(depth=2).double().eval(), torch.randn(1, 3, 64, 96, dtype=torch.float64)
    x = model.model.forward_intermediates(image, indices=1, norm=True, intermediates_only=True)[0]
    assert torch.equal(x, model.model.tokens_to_map(model.model.forward_features(image), image.shape[2:]))

    def norm(x, layer):
        return F.layer_norm(x.movedim(1, -1), x.shape[1:2], layer.weight, layer.bias, 1e-6).movedim(-1, 1)

    def up(x, layer):
        return F.conv_transpose2d(x, layer.weight, layer.bias, stride=2)

    def out(x, layers):
        x = norm(F.conv2d(x, layers[0].weight), layers[1])
        return norm(F.conv2d(x, layers[2].weight, padding=1), layers[3])

    four, eight, sixteen, thirty_two = model.pyramid
    want = [
        out(up(F.gelu(norm(up(x, four[0]), four[1])), four[3]), four[4:]),
        out(up(x, eight[0]), eight[1:]),
        out(x, sixteen),
        out(F.max_pool2d(x, 2), thirty_two[1:]),
    ]
    torch.testing.assert_close(model(image), want)
    assert (four[0].out_channels, four[3].out_channels, eight[0].out_channels) == (32, 16, 32)


@pytest.mark.parametrize(("patch", "stride"), [(16, 16), (16, 8), (8, 4)])
def test_a_patch_is_in_the_middle_of_its_cell(patch, stride):
    size = 5 * stride + 3
    rows = torch.arange(1.0, size + 1).view(1, 1, -1, 1).expand(1, 1, size, size)
    padded = pad_to_patches(rows, patch, stride)
    means = F.avg_pool2d(padded, patch, stride)[0, 0, :, 2]
    assert len(means) == 6
    before = (patch - stride) // 2
    whole = slice(-(-before // stride), 5 - -(-before // stride))  # patches without padding
    middles = stride * torch.arange(6) + (stride + 1) / 2
    torch.testing.assert_close(means[whole], middles[whole])


@pytest.mark.parametrize("name", ISOTROPIC)
def test_pretrained_weights(name, tmp_path):
    torch.manual_seed(1)
    classifier = timm.create_model(name).eval()
    save_file(classifier.state_dict(), tmp_path / "weights.safetensors")
    overlay = {"file": str(tmp_path / "weights.safetensors")}
    model = pyramid(name, pretrained=True, pretrained_cfg_overlay=overlay).eval()
    image = torch.randn(1, 3, 64, 64)
    (want,) = classifier.forward_intermediates(image, indices=1, norm=True, intermediates_only=True)
    (found,) = model.model.forward_intermediates(image, indices=1, norm=True, intermediates_only=True)
    torch.testing.assert_close(found, want)


def test_chosen_strides():
    model = pyramid(out_indices=(1, -1))
    assert model.feature_info.reduction() == [8, 32] and len(model.pyramid) == 2
    whole = pyramid(out_indices=4)
    whole.pyramid[1], whole.pyramid[3] = model.pyramid
    whole.model, image = model.model, torch.randn(1, 3, 40, 64)
    torch.testing.assert_close(model(image), whole(image)[1::2])
    capped = pyramid(out_indices=2, output_stride=8)
    assert capped.feature_info.reduction() == [8, 8]
    assert {tuple(x.shape[2:]) for x in capped(image)} == {(5, 8)}
    fine = pyramid(patch_size=4)  # as vim_nano: nothing to deconvolve
    assert [tuple(x.shape[2:]) for x in fine(image)] == [(10, 16), (5, 8), (3, 4), (2, 2)]


def test_ways_out_and_16_bits():
    model, image = pyramid(depth=1).eval(), torch.randn(1, 3, 40, 64)
    want = model(image)
    torch.testing.assert_close(torch.jit.script(model)(image), want)
    torch.testing.assert_close(torch.export.export(model, (image,)).module()(image), want)
    model.set_grad_checkpointing()
    with torch.autocast("cpu", torch.bfloat16):
        loss = sum(x.float().square().mean() for x in model.train()(image))
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    half = pyramid(dtype=torch.bfloat16)
    assert {x.dtype for x in half(image.bfloat16())} == {torch.bfloat16}


def test_weight_decay_spares_the_same_parameters():
    names = timm.create_model("test_vim").no_weight_decay()
    assert pyramid().no_weight_decay() == {f"model.{name}" for name in names} and names


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("test_vim", {"pyramid_channels": 0}, "pyramid_channels must be at least 1 and whole, got 0"),
        (
            "test_vim",
            {"features_only": False},
            "pyramid_channels is for features_only=True of Vim.*got it for test_vim",
        ),
        ("test_vim", {"patch_size": 14}, "stride in .*, got .14, 14."),
        ("test_vim", {"output_stride": 12}, "output_stride must be one of .*, got 12"),
        (
            "test_vim",
            {"pyramid_channels": None, "output_stride": 16},
            "test_vim has one resolution: output_stride needs",
        ),
        ("test_videomamba", {"num_frames": 2}, "pyramid_channels is for models of images, got num_frames=2"),
        ("test_vmamba", {}, "pyramid_channels is for .* Vim, VideoMamba and Mamba-R, got it for test_vmamba"),
    ],
)
def test_options_that_make_no_pyramid(name, options, message):
    with pytest.raises(ValueError, match=message):
        pyramid(name, **options)
