"""Labels from a CSV file: one class a file, or any number of them."""

import csv
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from vim.data.images import read_image
from vim.data.loading import IGNORED, Label
from vim.errors import UserError, describe

PARTS = ("train", "val", "test")
_FORMATS = "file,label, or file,labels with names separated by ';', or file and a column of 0 and 1 for each class"
_VALUES = {"": IGNORED, "0": 0, "1": 1, "0.0": 0, "1.0": 1}  # pandas writes 1.0 where a column has empty cells

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Labels:
    """The files of one part of a data set, and their labels.

    Attributes:
        files: their paths.
        targets: (files,) class indices; or if a file may have several labels (files, classes), int8: 1, 0, or
            `IGNORED` where a label is not known.
        classes: the names of the classes.
    """

    files: list[str]
    targets: Tensor
    classes: list[str]

    def label(self, index: int) -> Label:
        """Return the label of a file."""
        return self.targets[index] if self.targets.ndim == 2 else int(self.targets[index])


@dataclass(frozen=True)
class _Row:
    where: str  # the file and the line, for errors
    cells: dict[str, str]


def read_labels(root: Path, name: str, part: str) -> Labels:
    """Read the labels of one part of a data set from a CSV file with a header.

    The first column, `file`, has paths relative to the folder. The others are one of:

    - `label`: the name of the file's class;
    - `labels`: the names of the classes that the file has, separated by `;`, or nothing if it has none;
    - a column for each class: 1, 0, or nothing where it is not known.

    A column `split` has the part, such as `train` or `val`, of each file. Without it, it is the first folder of the
    file's path. With `label` or `labels`, other columns are not read.

    Args:
        root: the folder.
        name: the CSV file, relative to the folder.
        part: "train", "val" or "test".

    Raises:
        UserError: the file cannot be read, has another layout, or no file of that part; a path leads out of the
            folder, or comes twice.
    """
    path = root / name
    header, rows = _read_table(path)
    parts = [_part(row) for row in rows]
    files = _files(root, rows)
    own = [i for i, one in enumerate(parts) if one == part]
    if not own:
        others = f", only of {', '.join(sorted(set(parts)))}" if parts else ""
        raise UserError(f"{path} has no file of the part {part!r}{others}")
    if "label" in header or "labels" in header:
        classes, targets = _by_name(rows, own, several="labels" in header)
    else:
        classes = [column for column in header if column not in ("file", "split")]
        values = [[_value(rows[i], name) for name in classes] for i in own]
        targets = torch.tensor(values, dtype=torch.int8)
    return Labels([files[i] for i in own], targets, classes)


def _read_table(path: Path) -> tuple[list[str], list[_Row]]:
    """Read the header and the rows that are not empty."""
    if not path.is_file():
        raise UserError(f"no such file: {path} (data.labels names a CSV file in data.root)")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            header = [cell.strip() for cell in next(reader, [])]
            _check_header(path, header)
            rows = []
            for cells in reader:
                where = f"{path}, line {reader.line_num}"
                if not any(cell.strip() for cell in cells):
                    continue
                if len(cells) != len(header):
                    raise UserError(f"{where} has {len(cells)} cells, and the header {len(header)}: make them equal")
                rows.append(_Row(where, dict(zip(header, (cell.strip() for cell in cells), strict=True))))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read the labels {path} ({describe(error)}): give a CSV file {_FORMATS}") from None
    return header, rows


def _check_header(path: Path, header: list[str]) -> None:
    twice = [name for name in header if header.count(name) > 1]
    if header[:1] != ["file"] or "" in header or twice or {"label", "labels"} <= {*header}:
        problem = f"the column {twice[0]!r} twice" if twice else f"the columns {','.join(header)[:100]!r}"
        raise UserError(f"{path} has {problem}: expected {_FORMATS}, and on request split, separated by commas")
    if not {*header} - {"file", "split"}:
        raise UserError(f"{path} has no labels: expected {_FORMATS}")


def _part(row: _Row) -> str:
    part = row.cells["split"] if "split" in row.cells else row.cells["file"].partition("/")[0]
    if part not in PARTS:
        hint = "" if "split" in row.cells else ", the first folder of each path, or a column split"
        raise UserError(
            f"{row.where}: the part must be {', '.join(PARTS[:-1])} or {PARTS[-1]}{hint}, got {part[:100]!r}"
        )
    return part


def _files(root: Path, rows: Sequence[_Row]) -> list[str]:
    """Return the paths of the files, which must lie in the folder and differ."""
    base = os.path.normpath(root)
    files: dict[str, None] = {}
    for row in rows:
        file = os.path.normpath(os.path.join(base, row.cells["file"]))
        if file == base or "\0" in file or not Path(file).is_relative_to(base):
            raise UserError(f"{row.where}: {row.cells['file'][:100]!r} is not a file in {base}")
        if file in files:
            raise UserError(f"{row.where}: {row.cells['file'][:100]!r} comes twice: give all its labels in one line")
        files[file] = None
    return list(files)


def _by_name(rows: Sequence[_Row], own: Sequence[int], *, several: bool) -> tuple[list[str], Tensor]:
    """Return the classes of all rows, sorted by name, and the targets of the rows `own`."""
    names = [_names(row, several=several) for row in rows]
    classes = sorted({name for some in names for name in some})
    index_of = {name: index for index, name in enumerate(classes)}
    if not several:
        if len(classes) == 1:
            _logger.warning("the labels hold one class only, %r: every prediction is right", classes[0])
        return classes, torch.tensor([index_of[names[i][0]] for i in own])
    targets = torch.zeros(len(own), len(classes), dtype=torch.int8)
    for place, i in enumerate(own):
        targets[place, [index_of[name] for name in names[i]]] = 1
    return classes, targets


def _names(row: _Row, *, several: bool) -> list[str]:
    if several:
        return [name for part in row.cells["labels"].split(";") if (name := part.strip())]
    name = row.cells["label"]
    if not name or ";" in name:
        problem = f"{name[:100]!r}: name the column labels if a file may have several" if name else "no label"
        raise UserError(f"{row.where}: expected the name of one class, got {problem}")
    return [name]


def _value(row: _Row, name: str) -> int:
    value = row.cells[name]
    if value not in _VALUES:
        raise UserError(f"{row.where}: the column {name[:100]!r} must have 0, 1 or nothing, got {value[:100]!r}")
    return _VALUES[value]


def ignored(label: Label) -> Label:
    """Return the label of a file that does not count, in a data set with labels such as this."""
    return torch.full_like(label, IGNORED) if isinstance(label, Tensor) else IGNORED


def several_labels(dataset: object) -> bool:
    """Return whether an item of a data set may have several labels."""
    return isinstance(getattr(dataset, "ignored", IGNORED), Tensor)


class LabelledImages(Dataset[tuple[Image.Image, Label]]):
    """Image files as PIL images, with their labels.

    Args:
        mode: PIL's mode for the images: "RGB", or "L" for grey.
    """

    def __init__(self, labels: Labels, mode: str) -> None:
        self.labels, self.mode, self.classes = labels, mode, labels.classes
        self.targets, self.ignored = labels.targets, ignored(labels.label(0))

    def __len__(self) -> int:
        return len(self.labels.files)

    def __getitem__(self, index: int) -> tuple[Image.Image, Label]:
        return read_image(self.labels.files[index], self.mode), self.labels.label(index)
