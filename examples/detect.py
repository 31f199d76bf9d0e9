"""Detect handwritten digits on photographs with a backbone of timm's, in torchvision's FCOS.

    python examples/detect.py --backbone test_vmamba
    python examples/detect.py --backbone vim_nano --pyramid 64
    python examples/detect.py --backbone resnet18

It trains from scratch for some minutes on one thread of a processor, and prints the average precision on held-out
scenes: COCO's mean over ten thresholds of overlap, and that at an overlap of 0.5. See scenes.py for the data. It needs
the extra `clients`: pip install -e '.[clients]'.
"""

import argparse

import timm
import torch
from scenes import Scenes
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.detection import MeanAveragePrecision
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork
from training import fit

import vim  # noqa: F401  registers the models

CHANNELS = 64
LEVELS = ["4", "8", "16", "32"]  # the strides of the maps


class Backbone(nn.Module):
    """Maps of a model of timm's at strides 4 to 32, each made of the coarser ones too."""

    def __init__(self, name: str, pyramid: int | None) -> None:
        super().__init__()
        self.maps = timm.create_model(name, features_only=True, out_indices=4, pyramid_channels=pyramid)
        self.fpn = FeaturePyramidNetwork(self.maps.feature_info.channels(), CHANNELS)
        self.out_channels = CHANNELS

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Map (b, c, h, w) to four maps by name."""
        return self.fpn(dict(zip(LEVELS, self.maps(images), strict=True)))


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="test_vmamba", help="any model of timm's with maps at strides 4 to 32")
    parser.add_argument("--pyramid", type=int, help="channels of the pyramid of a model of one resolution, as vim_nano")
    parser.add_argument("--size", type=int, default=64, help="height and width of the scenes in pixels")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--held-out", type=int, default=300, help="scenes to test on")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def build(args: argparse.Namespace) -> nn.Module:
    """Return the detector of ten digits. Each of its levels finds objects of 4 to 8 times the size of its anchors."""
    anchors = AnchorGenerator(((2,), (4,), (8,), (16,)), ((1.0,),) * len(LEVELS))
    sizes = {"min_size": args.size, "max_size": args.size}
    scaled = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}  # the scenes are from -1 to 1
    backbone = Backbone(args.backbone, args.pyramid)
    return FCOS(backbone, num_classes=11, anchor_generator=anchors, score_thresh=0.05, **sizes, **scaled)


def train(model: nn.Module, args: argparse.Namespace) -> None:
    """Train on new scenes in every step."""
    loader = DataLoader(Scenes(True, args.steps * args.batch, args.size, args.seed), args.batch, collate_fn=list)

    def loss_of(scenes: list[tuple[Tensor, ...]]) -> Tensor:
        targets = [{"boxes": boxes, "labels": labels} for _, _, boxes, labels in scenes]
        return sum(model([image for image, *_ in scenes], targets).values())

    fit(model, loader, loss_of, args)


@torch.inference_mode()
def test(model: nn.Module, args: argparse.Namespace) -> dict[str, Tensor]:
    """Return average precisions on held-out scenes, by name."""
    model.eval()
    precision = MeanAveragePrecision()
    for scenes in DataLoader(Scenes(False, args.held_out, args.size), args.batch, collate_fn=list):
        targets = [{"boxes": boxes, "labels": labels} for _, _, boxes, labels in scenes]
        precision.update(model([image for image, *_ in scenes]), targets)
    return precision.compute()


def main() -> None:
    """Train and test."""
    args = parse()
    torch.manual_seed(args.seed)
    model = build(args)
    train(model, args)
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    found = test(model, args)
    figures = f"held-out AP {100 * found['map']:.1f} %, AP50 {100 * found['map_50']:.1f} %"
    print(f"{args.backbone}: {millions:.1f} M parameters, {figures}")


if __name__ == "__main__":
    main()
