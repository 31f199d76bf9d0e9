"""Segment handwritten digits on photographs with a backbone of timm's, in segmentation_models_pytorch's FPN.

    python examples/segment.py --backbone test_vmamba
    python examples/segment.py --backbone vim_nano --pyramid 64
    python examples/segment.py --backbone resnet18

It trains from scratch for some minutes on one thread of a processor, and prints the mean intersection over union of the
eleven classes (ten digits and the background) on held-out scenes. See scenes.py for the data. It needs the extra
`clients`: pip install -e '.[clients]'.
"""

import argparse

import segmentation_models_pytorch as smp
import timm
import torch
import torch.nn.functional as F
from scenes import Scenes
from timm.models import register_model
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassJaccardIndex
from training import fit

import vim  # noqa: F401  registers the models

CLASSES = 11


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="test_vmamba", help="any model of timm's with maps at strides 4 to 32")
    parser.add_argument("--pyramid", type=int, help="channels of the pyramid of a model of one resolution, as vim_nano")
    parser.add_argument(
        "--size", type=int, default=64, help="height and width of the scenes in pixels, a multiple of 32"
    )
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--held-out", type=int, default=300, help="scenes to test on")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def build(args: argparse.Namespace) -> nn.Module:
    """Return the FPN. The library knows a backbone by its name alone, so one with a pyramid gets a name of its own."""

    @register_model
    def backbone(**options: object) -> nn.Module:
        return timm.create_model(args.backbone, pyramid_channels=args.pyramid, **options)

    width = {"decoder_pyramid_channels": 64, "decoder_segmentation_channels": 64}
    return smp.FPN("tu-backbone", encoder_weights=None, classes=CLASSES, **width)


def train(model: nn.Module, args: argparse.Namespace) -> None:
    """Train on new scenes in every step."""
    loader = DataLoader(Scenes(True, args.steps * args.batch, args.size, args.seed), args.batch, collate_fn=collate)
    dice = smp.losses.DiceLoss("multiclass")

    def loss_of(batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        images, masks = batch
        logits = model(images)
        return F.cross_entropy(logits, masks) + dice(logits, masks)

    fit(model, loader, loss_of, args)


@torch.inference_mode()
def test(model: nn.Module, args: argparse.Namespace) -> float:
    """Return the mean intersection over union in % on held-out scenes."""
    model.eval()
    iou = MulticlassJaccardIndex(CLASSES)
    for images, masks in DataLoader(Scenes(False, args.held_out, args.size), args.batch, collate_fn=collate):
        iou.update(model(images).argmax(1), masks)
    return 100 * iou.compute().item()


def collate(scenes: list[tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Stack images and masks."""
    return torch.stack([scene[0] for scene in scenes]), torch.stack([scene[1] for scene in scenes])


def main() -> None:
    """Train and test."""
    args = parse()
    torch.manual_seed(args.seed)
    model = build(args)
    train(model, args)
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    print(f"{args.backbone}: {millions:.1f} M parameters, held-out mIoU {test(model, args):.1f} %")


if __name__ == "__main__":
    main()
