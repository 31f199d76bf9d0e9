"""The data sets that a config can name."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from PIL import Image
from timm.data import create_dataset
from timm.data.dataset import ImageDataset, IterableImageDataset
from timm.data.readers.img_extensions import set_img_extensions
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from torch.utils.data import Dataset
from torchvision.datasets import VisionDataset

from vim.data.digits import Digits
from vim.data.files import IMAGES, is_system
from vim.data.images import UNDECODABLE, ImageFiles, convert, image_folder, read_image, reason
from vim.data.labels import LabelledImages, read_labels
from vim.data.mnist import Mnist5k
from vim.data.streams import Stream
from vim.data.video import Videos, build_videos, labelled_videos
from vim.errors import UserError, describe, printable, require
from vim.options import ImageData

BUILT_IN = {"digits": Digits, "mnist5k": Mnist5k}
TIMM_PREFIXES = ("hfds/", "hfids/", "wds/", "tfds/", "torch/")
READ_WITH = {"hfds": "datasets", "hfids": "datasets", "wds": "webdataset"}  # the packages of timm's prefixes


class TimmImages(Dataset[tuple[Image.Image, int]]):
    """A data set of timm's with random access. Images are decoded here, so that an unreadable one is named."""

    def __init__(self, dataset: ImageDataset, mode: str) -> None:
        self.dataset, self.mode = dataset, mode
        self.targets = getattr(dataset.reader, "targets", None)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        file, label = self.dataset.reader[index]
        return read_image(file, self.mode, name=self.filename(index)), label

    def filename(self, index: int) -> str:
        """The name of an image in messages."""
        return str(self.dataset.filename(index) or f"image {index} of {len(self)}")


class TorchvisionImages(Dataset[tuple[Image.Image, int]]):
    """A data set of torchvision's. Where it reads files through a function, that is replaced by :func:`read_image`."""

    def __init__(self, dataset: VisionDataset, mode: str) -> None:
        self.dataset, self.mode = dataset, mode
        if hasattr(dataset, "loader"):
            dataset.loader = partial(read_image, mode=mode)
        self.classes = getattr(dataset, "classes", None)
        self.targets = getattr(dataset, "targets", None)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        try:
            image, label = self.dataset[index]
            return convert(image, self.mode), label
        except UserError:  # from read_image
            raise
        except UNDECODABLE as error:
            raise UserError(f"cannot read image {index} of the data set ({reason(error)})") from error


Part: TypeAlias = Digits | ImageFiles | LabelledImages | TimmImages | TorchvisionImages | Videos | Stream


class Splits(NamedTuple):
    """The data to train on and the held-out data, and the names of the classes, or None if they are not known.

    Items are (PIL image, label), or for videos (list of PIL images, label): a class index, or with `data.labels` also
    what :class:`vim.data.labels.Labels` has of a file with several labels.
    """

    train: Part
    held_out: Part
    classes: list[str] | None


def build_datasets(data: ImageData, mode: str = "RGB") -> Splits:
    """Build the training and the held-out part of the data set that a config's `data` section names.

    `data.dataset` is one of:

    - "digits", "mnist5k": built in;
    - "folder": folders `train` and `val` in `data.root`, each with one folder of images a class;
    - "tar": the same as `train.tar` and `val.tar`;
    - a name with a prefix (hfds/, hfids/, wds/, tfds/, torch/): a data set of :func:`timm.data.create_dataset`, with
      the options in `data.train_options` and `data.val_options`, such as `split`;
    - "videos": annotations `train.csv` and `val.csv`, or folders of videos, in `data.root`;
    - "digit_motion": built-in videos, written to `data.root` or :func:`vim.data.video.motion.default_folder`.

    Both kinds of videos take the options of :func:`vim.data.video.build_videos` from `data.video`, and those of one
    part from `data.train_options` and so on.

    With `data.labels`, "folder" and "videos" take files and labels from that CSV file; see
    :func:`vim.data.labels.read_labels`.

    Args:
        mode: PIL's mode for the images: "RGB", or "L" for grey.

    Raises:
        UserError: the name is unknown, a folder or a package is missing, or the parts have different classes.
    """
    train, held_out = (part(data, name, mode) for name in ("train", "val"))
    return Splits(train, held_out, _classes(data, train, held_out))


def part(data: ImageData, name: str, mode: str) -> Part:
    """Build one part, "train" or "val", or "test" of videos; see :func:`build_datasets`."""
    dataset, root = data.dataset, data.root
    own = {"train": data.train_options, "val": data.val_options}.get(name, {})
    if data.labels is not None:
        labels = read_labels(_root(root, data.labels), data.labels, name)
        if dataset == "folder":
            return LabelledImages(labels, mode)
        if dataset == "videos":
            return labelled_videos(labels, mode, is_training=name == "train", **{**data.video, **own})
        raise UserError(f"data.labels is for data.dataset='folder' or 'videos', got {dataset!r}: leave it out")
    if dataset in BUILT_IN:
        return BUILT_IN[dataset](train=name == "train", mode=mode)
    if dataset == "folder":
        return image_folder(_root(root, name) / name, mode)
    if dataset == "videos":
        return build_videos(_root(root, f"{name}.csv"), name, mode, **{**data.video, **own})
    if dataset == "digit_motion":
        from vim.data.video import motion  # here, because `python -m` runs it as a module of its own

        folder = Path(str(root)) if root else motion.default_folder()
        motion.ensure(folder)
        return build_videos(folder, name, mode, **{**data.video, **own})
    options = {"batch_size": data.batch_size, **own}
    if dataset == "tar":
        return _timm("", str(Path(str(root)) / f"{name}.tar"), name, mode, options)
    if dataset.startswith(TIMM_PREFIXES):
        return _timm(dataset, root, name, mode, options)
    names = ", ".join(repr(known) for known in (*BUILT_IN, "digit_motion", "folder", "tar", "videos"))
    raise UserError(f"data.dataset must be {names}, or one of timm's with {', '.join(TIMM_PREFIXES)}, got {dataset!r}")


def _root(root: object, content: str) -> Path:
    if not root:
        raise UserError(f"data.root must name the folder that holds {content}: --cfg-options data.root=PATH")
    return Path(str(root))


def _timm(name: str, root: str | None, split: str, mode: str, options: Mapping[str, Any]) -> Part:
    prefix = name.partition("/")[0]
    if prefix in READ_WITH:
        require(READ_WITH[prefix], f"the data set {name}")
    default = {"split": {"train": "train", "val": "validation"}[split], "is_training": split == "train"}
    set_img_extensions(IMAGES.suffixes)  # timm's own are three
    try:
        dataset = create_dataset(name, root=root, input_img_mode=mode, **{**default, **options})
    except Exception as error:  # readers raise many classes, and assertions
        raise UserError(f"cannot open the data set {name or root} ({split}): {describe(error)}") from error
    if isinstance(dataset, IterableImageDataset):
        return Stream(dataset, mode)
    if not hasattr(dataset, "reader"):
        return TorchvisionImages(dataset, mode)
    if isinstance(dataset.reader, ReaderImageInTar):
        _leave_out_system_files(dataset.reader)
    return TimmImages(dataset, mode)


def _leave_out_system_files(reader: ReaderImageInTar) -> None:
    """Leave hidden and system files out of a tar file's images, and classes of nothing else."""
    paths = [Path(member.name).parts for member, _, _ in reader.samples]
    kept = [i for i, names in enumerate(paths) if not any(map(is_system, names))]
    reader.samples, old = reader.samples[kept], reader.targets[kept]
    used, reader.targets = np.unique(old, return_inverse=True)
    reader.class_name_to_idx = {reader.class_idx_to_name[index]: i for i, index in enumerate(used.tolist())}


def class_names(dataset: object) -> list[str] | None:
    """The names of a data set's classes in the order of their indices, escaped, or None if it does not have them."""
    if names := getattr(dataset, "classes", None):
        return [printable(name) for name in names]
    reader = getattr(getattr(dataset, "dataset", dataset), "reader", None)
    to_index = getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None)
    if to_index:
        return [printable(name) for name in sorted(to_index, key=to_index.get)]
    return None


def _classes(data: ImageData, train: Part, held_out: Part) -> list[str] | None:
    names, others = class_names(train), class_names(held_out)
    if names != others:
        different = sorted(set(names or ()) ^ set(others or ()))
        raise UserError(
            f"train and val in {data.root} must hold the same classes; only one of them has "
            f"{', '.join(different[:5])}: add these folders to the other, or take them out"
        )
    return names
