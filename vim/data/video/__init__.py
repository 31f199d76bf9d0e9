"""Videos: files and annotations in, clips out."""

from vim.data.video.annotations import Video, find_videos, read_annotations
from vim.data.video.dataset import Videos, build_videos, labelled_videos
from vim.data.video.reading import read_frames, read_video
from vim.data.video.transforms import video_eval_transform, video_train_transform

__all__ = [
    "Video",
    "Videos",
    "build_videos",
    "find_videos",
    "labelled_videos",
    "read_annotations",
    "read_frames",
    "read_video",
    "video_eval_transform",
    "video_train_transform",
]
