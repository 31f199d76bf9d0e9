"""ImageNet-1k as VideoMamba-Tiny's: AutoAugment for RandAugment, and each image once.

The authors' policy is timm's "v0", of which one part in 25 posterizes images to black, and fails since Pillow 13. "v0r"
posterizes to more bits and is the same else.
"""

_base_ = ["deit_in1k.py"]

data = dict(repeats=1, train_transform=dict(auto_augment="v0r"))
