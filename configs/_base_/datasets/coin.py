"""COIN as data.root/train.csv and data.root/val.csv: a video's path and its class (of 180) per line.

Paths are relative to data.root, or to data.video.prefix.
"""

_base_ = ["../augmentations/videomamba.py"]

data = dict(dataset="videos", root="", num_workers=10, video=dict(sampling="sparse"))
