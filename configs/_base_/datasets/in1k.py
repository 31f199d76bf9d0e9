"""ImageNet-1k as folders: PATH/train/n01440764/*.JPEG and PATH/val/n01440764/*.JPEG, with --cfg-options data.root=PATH.

The validation images come in one folder; https://github.com/soumith/imagenetloader.torch has a script that sorts them.
"""

data = dict(dataset="folder", root="", num_workers=8)
