"""Something-Something v2 as PATH/train.csv and PATH/val.csv, lines of a video's path and its class of 174.

With --cfg-options data.root=PATH; the videos lie there as well, or elsewhere with data.video.prefix=FOLDER.

None is flipped: left and right are classes.
"""

_base_ = ["../augmentations/videomamba.py"]

data = dict(dataset="videos", root="", num_workers=10, video=dict(sampling="ssv2"), train_transform=dict(hflip=0.0))
