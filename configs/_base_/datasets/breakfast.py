"""Breakfast as PATH/train.csv and PATH/val.csv, lines of a video's path and its class of 10.

With --cfg-options data.root=PATH; the videos lie there as well, or elsewhere with data.video.prefix=FOLDER.
"""

_base_ = ["../augmentations/videomamba.py"]

data = dict(dataset="videos", root="", num_workers=10, video=dict(sampling="sparse"))
