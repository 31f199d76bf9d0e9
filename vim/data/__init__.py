"""Files in, tensors out."""

from vim.data.datasets import Splits, build_datasets, class_names, part
from vim.data.digits import Digits
from vim.data.images import ImageFiles, find_images, read_image
from vim.data.labels import several_labels
from vim.data.loading import IGNORED, Batch, Share, create_loader, seed_all
from vim.data.transforms import (
    eval_transform,
    image_mode,
    input_options,
    input_shape,
    num_frames,
    train_transform,
)
from vim.data.trial import make_transform
from vim.data.video import Videos, find_videos, read_video, video_eval_transform, video_train_transform

__all__ = [
    "IGNORED",
    "Batch",
    "Digits",
    "ImageFiles",
    "Share",
    "Splits",
    "Videos",
    "build_datasets",
    "class_names",
    "create_loader",
    "eval_transform",
    "find_images",
    "find_videos",
    "image_mode",
    "input_options",
    "input_shape",
    "make_transform",
    "num_frames",
    "part",
    "read_image",
    "read_video",
    "seed_all",
    "several_labels",
    "train_transform",
    "video_eval_transform",
    "video_train_transform",
]
