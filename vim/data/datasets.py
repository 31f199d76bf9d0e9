"""The data sets a config can name."""

from pathlib import Path
from typing import Any, NamedTuple

from torch.utils.data import Dataset

from vim.data.digits import Digits
from vim.data.images import image_folder
from vim.errors import UserError


class Splits(NamedTuple):
    """What is trained on and what is held out, each yielding (PIL image, class index); and the classes' names."""

    train: Dataset[Any]
    held_out: Dataset[Any]
    classes: list[str]


def build_datasets(data: dict[str, Any], mode: str = "RGB") -> Splits:
    """The data set named `data["dataset"]`: "digits", or "folder", with `train` and `val` below `data["root"]`.

    Args:
        mode: PIL's name for the kind of images wanted: "L" for grey.

    Raises:
        UserError: an unknown name, a folder that is missing or empty, or classes that differ between the parts.
    """
    dataset = data.get("dataset")
    if dataset == "digits":
        train: Any = Digits(train=True, mode=mode)
        held_out: Any = Digits(train=False, mode=mode)
    elif dataset == "folder":
        if not data.get("root"):
            raise UserError("data.root must name the folder that holds train and val: --cfg-options data.root=PATH")
        train, held_out = (image_folder(Path(str(data["root"])) / part, mode) for part in ("train", "val"))
    else:
        raise UserError(f"data.dataset must be 'digits' or 'folder', got {dataset!r}")
    if train.classes != held_out.classes:
        different = sorted(set(train.classes) ^ set(held_out.classes))
        raise UserError(
            f"train and val in {data['root']} must hold the same classes; only one of them has "
            f"{', '.join(different[:5])}: add these folders to the other, or take them out"
        )
    return Splits(train, held_out, train.classes)
