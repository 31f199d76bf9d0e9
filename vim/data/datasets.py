"""The data sets a config can name."""

from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from timm.data import create_dataset
from torch.utils.data import Dataset, IterableDataset

from vim.data.digits import Digits
from vim.data.images import UNDECODABLE, convert, image_folder, read_image, reason
from vim.data.mnist import Mnist5k
from vim.data.streams import Stream
from vim.data.video import build_videos
from vim.errors import UserError, describe

BUILT_IN = {"digits": Digits, "mnist5k": Mnist5k}
TIMM_PREFIXES = ("hfds/", "hfids/", "wds/", "tfds/", "torch/")


class Splits(NamedTuple):
    """What is trained on and what is held out, each yielding (PIL image, class index); and the classes' names.

    Of videos it is (list of PIL images, class index). The names are None where a data set does not say them.
    """

    train: Any
    held_out: Any
    classes: list[str] | None


class TimmImages(Dataset[Any]):
    """A data set of timm's with random access, whose images are read here: it is known which cannot be."""

    def __init__(self, dataset: Any, mode: str) -> None:
        self.dataset, self.mode = dataset, mode

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        file, label = self.dataset.reader[index]
        return read_image(file, self.mode, name=self.filename(index)), label

    def filename(self, index: int) -> str:
        """What to call an image."""
        return str(self.dataset.filename(index) or f"image {index} of {len(self)}")


class TorchvisionImages(Dataset[Any]):
    """A data set of torchvision's, which reads the images itself."""

    def __init__(self, dataset: Any, mode: str) -> None:
        self.dataset, self.mode = dataset, mode
        self.classes = getattr(dataset, "classes", None)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        try:
            image, label = self.dataset[index]
            return convert(image, self.mode), label
        except UNDECODABLE as error:
            raise UserError(f"cannot read image {index} of the data set ({reason(error)})") from error


def build_datasets(data: dict[str, Any], mode: str = "RGB") -> Splits:
    """The data set named `data["dataset"]`, in its two parts.

    "digits" and "mnist5k" come with packages. "folder" has `train` and `val` below `data["root"]`, and in each a
    folder a class; "tar" has `train.tar` and `val.tar` like these. Names with a prefix (hfds/, hfids/, wds/, tfds/,
    torch/) are those of `timm.data.create_dataset`, which gets `data["train_options"]` or `data["val_options"]`, such
    as `split`. "videos" has `train.csv` and `val.csv` in `data["root"]`, or videos as "folder" has images;
    "digit_motion" makes its own, in that folder or in :func:`vim.data.motion.default_folder`. Both take the options of
    :func:`vim.data.video.build_videos`.

    Args:
        mode: PIL's name for the kind of images wanted: "L" for grey.

    Raises:
        UserError: an unknown name, a folder that is missing or empty, or classes that differ between the parts.
    """
    train, held_out = (part(data, name, mode) for name in ("train", "val"))
    return Splits(train, held_out, _classes(data, train, held_out))


def part(data: dict[str, Any], name: str, mode: str) -> Any:
    """The "train" or the "val" part of a data set, of videos also the "test" part; see :func:`build_datasets`."""
    dataset, root = str(data.get("dataset")), data.get("root")
    if dataset in BUILT_IN:
        return BUILT_IN[dataset](train=name == "train", mode=mode)
    options = {"batch_size": data.get("batch_size", 1), **data.get(f"{name}_options", {})}
    if dataset == "videos":
        return build_videos(data, name, mode)
    if dataset == "digit_motion":
        from vim.data import motion  # not before: it is also run by itself

        folder = Path(str(root)) if root else motion.default_folder()
        motion.ensure(folder)
        return build_videos({**data, "root": folder}, name, mode)
    if dataset == "folder":
        if not root:
            raise UserError(f"data.root must name the folder that holds {name}: --cfg-options data.root=PATH")
        return image_folder(Path(str(root)) / name, mode)
    if dataset == "tar":
        return _timm("", Path(str(root)) / f"{name}.tar", name, mode, options)
    if dataset.startswith(TIMM_PREFIXES):
        return _timm(dataset, root, name, mode, options)
    names = ", ".join(repr(known) for known in (*BUILT_IN, "digit_motion", "folder", "tar", "videos"))
    raise UserError(f"data.dataset must be {names}, or one of timm's with {', '.join(TIMM_PREFIXES)}, got {dataset!r}")


def _timm(name: str, root: Any, split: str, mode: str, options: dict[str, Any]) -> Any:
    default = {"split": {"train": "train", "val": "validation"}[split], "is_training": split == "train"}
    try:
        dataset: Any = create_dataset(name, root=root and str(root), input_img_mode=mode, **{**default, **options})
    except Exception as error:  # readers raise many kinds, and assertions
        raise UserError(f"cannot open the data set {name or root} ({split}): {describe(error)}") from error
    if isinstance(dataset, IterableDataset):
        return Stream(dataset, mode)
    return (TimmImages if hasattr(dataset, "reader") else TorchvisionImages)(dataset, mode)


def class_names(dataset: Any) -> list[str] | None:
    """The names of a data set's classes, in their order, where it says them."""
    if getattr(dataset, "classes", None):
        return list(dataset.classes)
    reader = getattr(getattr(dataset, "dataset", dataset), "reader", None)
    to_index = getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None)
    if to_index:
        return [str(name) for name in sorted(to_index, key=to_index.get)]
    return None


def _classes(data: dict[str, Any], train: Any, held_out: Any) -> list[str] | None:
    names, others = class_names(train), class_names(held_out)
    if names != others:
        different = sorted(set(names or ()) ^ set(others or ()))
        raise UserError(
            f"train and val in {data.get('root')} must hold the same classes; only one of them has "
            f"{', '.join(different[:5])}: add these folders to the other, or take them out"
        )
    return names
