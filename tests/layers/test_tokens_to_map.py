"""Where a token is in the image: planted in one patch, read from the tokens."""

import pytest
import timm
import torch

import vim  # noqa: F401  registers the models

TOKENS = [
    *(("test_vim", {"class_token": place}) for place in ("middle", "first", "ends", "none")),
    ("test_vim_ssd", {}),
    ("test_vim_s4d", {}),
    ("test_mambar", {}),
    ("test_mambar", {"num_registers": 7}),
    ("test_videomamba", {}),
]
CLIPS = [{"scan_order": order} for order in ("spatial_first", "temporal_first", "spatiotemporal_v2")]


def inputs_of(module, model, image):
    """What a module takes in a run of the model."""
    kept = []
    with module.register_forward_pre_hook(lambda _, arguments: kept.append(arguments[0])), torch.no_grad():
        model(image)
    return kept[0]


@pytest.mark.parametrize(("name", "options"), TOKENS, ids=str)
@pytest.mark.parametrize("place", [(0, 0), (1, 3), (2, 4), (3, 0)], ids=str)
def test_patches(name, options, place):
    model = timm.create_model(name, img_size=(64, 80), **options).eval()
    image = torch.zeros(1, 3, 64, 80)
    before = inputs_of(model.layers[0], model, image)
    rows, columns = (slice(16 * i, 16 * i + 16) for i in place)
    image[:, :, rows, columns] = 1
    change = model.tokens_to_map((inputs_of(model.layers[0], model, image) - before).abs().sum(-1, keepdim=True))
    assert change.shape == (1, 1, 4, 5)
    assert change[0, 0].nonzero().tolist() == [list(place)]


@pytest.mark.parametrize("options", CLIPS, ids=str)
def test_tubelets(options):
    model = timm.create_model("test_videomamba", num_frames=4, tubelet_size=2, **options).eval()
    clip = torch.zeros(1, 3, 4, 64, 64)
    before = inputs_of(model.layers[0], model, clip)
    clip[:, :, 2, 16:32, 48:64] = 1
    change = (inputs_of(model.layers[0], model, clip) - before).abs().sum(-1, keepdim=True)
    assert model.tokens_to_map(change)[0, 0].nonzero().tolist() == [[1, 1, 3]]
    assert torch.equal(model.tokens_to_map(change, (4, 64, 64)), model.tokens_to_map(change))


@pytest.mark.parametrize("size", [(128, 96), (71, 130)], ids=str)
@pytest.mark.parametrize("output_stride", [32, 8])
@pytest.mark.parametrize("name", ["test_vim2", "test_vmamba", "test_mambavision", "test_vssd", "test_convnext_s4nd"])
def test_layers_of_stages_on_windows_and_dilated(name, output_stride, size):
    """The stage's map: in MambaVision out of windows of 4 and of 2, and with a smaller stride out of parts."""
    model = timm.create_model(name, output_stride=output_stride).eval()
    image = torch.randn(2, 3, *size)
    for stage in model.stages:
        stage.layers = torch.nn.Identity()  # so that the stage returns what its layers take
        kept = []
        stage.register_forward_hook(lambda _, arguments, out, kept=kept: kept.append(out))
        tokens = inputs_of(stage.layers, model, image)
        found = model.tokens_to_map(tokens, size)
        assert torch.equal(found, kept[0].permute(0, 3, 1, 2))
        assert torch.equal(model.tokens_to_map(kept[0], size), found)


@pytest.mark.parametrize(
    "name", ["test_vim", "test_mambar", "test_vim2", "test_vmamba", "test_mambavision", "test_vssd"]
)
def test_what_forward_features_returns(name):
    """Of models of tokens in a sequence, of those with stages a map already; a size may be one number."""
    model, image = timm.create_model(name, img_size=96).eval(), torch.randn(1, 3, 96, 96)
    want = model.forward_intermediates(image, indices=1, norm=True, intermediates_only=True)[0]
    for size in (None, 96, (96, 96), image.shape[2:]):
        assert torch.equal(model.tokens_to_map(model.forward_features(image), size), want)


def test_tokens_that_fill_no_map():
    with pytest.raises(ValueError, match=r"16 patches and 1 class tokens .b, l, d. expected .*, got .1, 16, 64."):
        timm.create_model("test_vim").tokens_to_map(torch.zeros(1, 16, 64))
    with pytest.raises(ValueError, match="tokens of a stage, or a map .*, got .1, 16, 7."):
        timm.create_model("test_mambavision").tokens_to_map(torch.zeros(1, 16, 7))
