"""Something-Something v2 as data.root/train.csv and data.root/val.csv: a video's path and its class (of 174) per line.

Paths are relative to data.root, or to data.video.prefix.

No clip is flipped: left and right are different classes.
"""

_base_ = ["../augmentations/videomamba.py"]

data = dict(dataset="videos", root="", num_workers=10, video=dict(sampling="ssv2"), train_transform=dict(hflip=0.0))
