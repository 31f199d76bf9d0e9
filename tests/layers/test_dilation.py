"""`output_stride` of the hierarchical families: their last stages at a higher resolution, with the same weights."""

import pytest
import timm
import torch
from safetensors.torch import save_file

import vim  # noqa: F401  registers the models
from vim.layers.stages import merge_phases, split_phases

STAGED = ("test_vim2", "test_vmamba", "test_mambavision", "test_vssd", "test_convnext_s4nd")
CASES = [
    *((name, {}) for name in STAGED),
    ("test_vmamba", {"version": "v0"}),
    ("test_mambavision", {"window_sizes": (2, 0)}),
    ("test_convnext_s4nd", {"stem": "s4nd", "downsample": "s4nd"}),
    ("test_vim2", {"channel_mixer": "transposed", "img_size": (71, 45)}),
]


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
@torch.no_grad()
def test_every_second_row_and_column_is_the_plain_map(name, options):
    torch.manual_seed(0)
    plain = timm.create_model(name, features_only=True, **options).double().eval()
    image = torch.randn(2, 3, 71, 45, dtype=torch.float64)
    want = plain(image)
    for output_stride in (32, 16, 8):
        model = timm.create_model(name, features_only=True, output_stride=output_stride, **options).double().eval()
        model.load_state_dict(plain.state_dict())
        strides = [min(stride, output_stride) for stride in (4, 8, 16, 32)]
        assert model.feature_info.reduction() == strides
        maps, third = model(image), want[1].shape[2:] if output_stride == 8 else want[2].shape[2:]
        for i, (found, stride) in enumerate(zip(maps, strides, strict=True)):
            step = 4 * 2**i // stride
            torch.testing.assert_close(found[:, :, ::step, ::step], want[i], rtol=1e-9, atol=1e-9)
        assert output_stride == 32 or maps[3].shape[2:] == third
        assert output_stride == 32 or maps[3].std(dim=(2, 3)).min() > 0


@pytest.mark.parametrize("name", STAGED)
def test_pretrained_weights_and_gradients(name, tmp_path):
    torch.manual_seed(0)
    save_file(timm.create_model(name).state_dict(), tmp_path / "weights.safetensors")
    overlay = {"file": str(tmp_path / "weights.safetensors")}
    model = timm.create_model(name, output_stride=16, num_classes=3, pretrained=True, pretrained_cfg_overlay=overlay)
    stages = [stage.dilation for stage in model.stages]
    assert stages == [1, 1, 1, 2]
    model(torch.randn(2, 3, 40, 72)).square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_no_such_stride():
    with pytest.raises(ValueError, match=r"output_stride must be one of \(4, 8, 16, 32\), got 12"):
        timm.create_model("test_vmamba", output_stride=12)


@pytest.mark.parametrize("size", [(4, 6), (5, 7)])
def test_a_part_of_a_map_is_every_second_row_and_column(size):
    """Each part is in its own place, which the map without `output_stride` does not show: it is the first of them."""
    x = torch.randn(3, *size, 2)
    parts = split_phases(x, 2).unflatten(0, (2, 2, 3))
    for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
        want = x[:, i::2, j::2]
        assert torch.equal(parts[i, j][:, : want.shape[1], : want.shape[2]], want)
    assert torch.equal(merge_phases(parts.flatten(0, 2), 2, *size), x)
