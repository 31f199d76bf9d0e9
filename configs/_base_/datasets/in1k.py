"""ImageNet-1k as folders: data.root/train/n01440764/*.JPEG and data.root/val/n01440764/*.JPEG.

The validation images are distributed in one folder. https://github.com/soumith/imagenetloader.torch has a script that
sorts them into one folder per class.
"""

data = dict(dataset="folder", root="", num_workers=8)
