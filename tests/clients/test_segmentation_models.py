"""segmentation_models_pytorch: its decoders on maps of every family, through its encoders of timm's models."""

import pytest
import timm
import torch
from timm.models import register_model

import vim  # noqa: F401  registers the models

smp = pytest.importorskip("segmentation_models_pytorch", reason="segmentation-models-pytorch is not installed")
NARROW = {
    "Unet": {"decoder_channels": (32, 16, 16, 8, 8)},
    "FPN": {"decoder_pyramid_channels": 32, "decoder_segmentation_channels": 32},
    "UPerNet": {"decoder_channels": 16},
    "Segformer": {"decoder_segmentation_channels": 16},
    "PAN": {"decoder_channels": 16},
    "DeepLabV3": {"decoder_channels": 16},
    "DeepLabV3Plus": {"decoder_channels": 16},
}


def build(decoder, name, **options):
    """A model of the library's. It knows a backbone by its name alone, so a pyramid gets a name of its own."""

    @register_model
    def test_pyramid(**others):
        return timm.create_model(name, pyramid_channels=16, **others)

    torch.manual_seed(0)
    encoder = "test_pyramid" if name in ("test_vim", "test_videomamba", "test_mambar") else name
    return getattr(smp, decoder)(f"tu-{encoder}", encoder_weights=None, classes=3, **{**NARROW[decoder], **options})


@pytest.mark.filterwarnings("ignore:Overwriting test_pyramid")
@pytest.mark.parametrize("decoder", ["Unet", "FPN", "UPerNet", "Segformer"])
@pytest.mark.parametrize("name", ["test_vim", "test_videomamba", "test_mambar"])
def test_a_step_on_a_pyramid(decoder, name):
    model = build(decoder, name)
    logits = model(torch.randn(2, 3, 64, 96))
    assert logits.shape == (2, 3, 64, 96)
    torch.nn.functional.cross_entropy(logits, torch.randint(3, (2, 64, 96))).backward()
    gradients = {key: parameter.grad for key, parameter in model.encoder.named_parameters()}
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients.values())
    assert sum("pyramid" in key for key in gradients) > 20


@pytest.mark.filterwarnings("ignore:Overwriting test_pyramid")
@pytest.mark.parametrize("name", ["test_vim", "test_vmamba"])
def test_images_of_any_size(name):
    """Of the library's models Unet alone takes them."""
    model = build("Unet", name).eval()
    for size in ((65, 97), (33, 130)):
        assert model(torch.randn(1, 3, *size)).shape == (1, 3, *size)
    assert build("Unet", name, encoder_depth=3, decoder_channels=(16, 8, 8)).encoder.output_stride == 8


@pytest.mark.filterwarnings("ignore:Overwriting test_pyramid")
@pytest.mark.parametrize(("decoder", "stride"), [("PAN", 16), ("DeepLabV3", 8), ("DeepLabV3Plus", 16)])
@pytest.mark.parametrize("name", ["test_vim", "test_vim2", "test_vmamba", "test_mambavision", "test_vssd"])
def test_output_strides(decoder, stride, name):
    model = build(decoder, name, encoder_output_stride=stride).eval()
    assert model.encoder(torch.randn(1, 3, 128, 128))[-1].shape[2:] == (128 // stride, 128 // stride)
    assert model(torch.randn(1, 3, 128, 128)).shape == (1, 3, 128, 128)
