"""Files in, tensors out."""

from vim.data.datasets import Splits, build_datasets, class_names, part
from vim.data.digits import Digits
from vim.data.images import find_images, read_image
from vim.data.loading import IGNORED, Batch, Share, create_loader, seed_all
from vim.data.transforms import eval_transform, image_mode, input_options, train_transform

__all__ = [
    "IGNORED",
    "Batch",
    "Digits",
    "Share",
    "Splits",
    "build_datasets",
    "class_names",
    "create_loader",
    "eval_transform",
    "find_images",
    "image_mode",
    "input_options",
    "part",
    "read_image",
    "seed_all",
    "train_transform",
]
