"""torchvision's detectors on maps of a pyramid, and of a hierarchical family."""

import pytest
import timm
import torch
from torch import nn

import vim  # noqa: F401  registers the models

pytest.importorskip("torchvision", reason="torchvision is not installed")
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet  # noqa: E402
from torchvision.models.detection.anchor_utils import AnchorGenerator  # noqa: E402
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign  # noqa: E402

LEVELS = ["4", "8", "16", "32"]
ANCHORS = ((8,), (16,), (32,), (64,)), ((0.5, 1.0, 2.0),) * 4


class Backbone(nn.Module):
    """The maps by name; a pyramid's have channels alike, others go through an FPN."""

    def __init__(self, name):
        super().__init__()
        options = {"pyramid_channels": 16} if name in ("test_vim", "test_videomamba", "test_mambar") else {}
        self.maps, self.out_channels = timm.create_model(name, features_only=True, **options), 16
        self.fpn = nn.Identity() if options else FeaturePyramidNetwork(self.maps.feature_info.channels(), 16)

    def forward(self, images):
        return self.fpn(dict(zip(LEVELS, self.maps(images), strict=True)))


def build(kind, name):
    torch.manual_seed(0)
    anchors, sizes = AnchorGenerator(*ANCHORS), {"min_size": 64, "max_size": 128}
    if kind is RetinaNet:
        return RetinaNet(Backbone(name), 3, anchor_generator=anchors, **sizes)
    pools = {"box_roi_pool": MultiScaleRoIAlign(LEVELS, 3, 2)}
    if kind is MaskRCNN:
        pools["mask_roi_pool"] = MultiScaleRoIAlign(LEVELS, 6, 2)
    return kind(Backbone(name), 3, rpn_anchor_generator=anchors, box_batch_size_per_image=16, **pools, **sizes)


CASES = [(FasterRCNN, "test_videomamba"), (FasterRCNN, "test_mambar")]
CASES += [(kind, name) for kind in (FasterRCNN, RetinaNet, MaskRCNN) for name in ("test_vim", "test_vmamba")]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_step_on_images_of_two_sizes(kind, name):
    model = build(kind, name)
    images, targets = [torch.rand(3, 71, 95), torch.rand(3, 100, 64)], []
    for image in images:
        masks = torch.zeros(1, *image.shape[1:], dtype=torch.uint8)
        masks[:, 10:40, 20:50] = 1
        targets.append({"boxes": torch.tensor([[20.0, 10, 50, 40]]), "labels": torch.tensor([1]), "masks": masks})
    losses = model(images, targets)
    sum(losses.values()).backward()
    for key, parameter in model.backbone.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key
        assert "pyramid" not in key or parameter.grad.any(), key
    found = model.eval()(images)
    assert len(found) == 2 and all(one["boxes"].shape[1:] == (4,) for one in found)
