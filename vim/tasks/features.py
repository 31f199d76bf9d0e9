"""Features of images and videos, in safetensors files with an index."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from vim.data import (
    IGNORED,
    ImageFiles,
    Share,
    Videos,
    create_loader,
    eval_transform,
    image_mode,
    num_frames,
    video_eval_transform,
)
from vim.data.video import Video
from vim.engine.files import make_folder, write_csv, written_whole
from vim.engine.weights import load_published, load_trained
from vim.errors import UserError, describe, printable
from vim.options import Section
from vim.typing import VisionModel

INDEX = "index.csv"
FILE_BYTES = 2**28  # of the features in a file, at most, unless those of one batch are more


class Features(NamedTuple):
    """Features of the files with these indices, and a message for each file that could not be read."""

    indices: list[int]
    values: Tensor  # (b, d), or maps (b, d, rows, columns), of clips (b, d, t, rows, columns); on the CPU
    unreadable: list[str]


def load_backbone(path: Path, name: str | None) -> tuple[VisionModel, Section]:
    """Return the model of a run's checkpoint, and the options of its evaluation transform.

    Args:
        name: the model of this package that a file of the published layout is for; None for a run's checkpoint.

    Raises:
        UserError: the file cannot be read, or does not fit.
    """
    if name is not None:
        return load_published(name, path), {}
    model, state = load_trained(path)
    return model, state["meta"]["eval_transform"]


class Extractor:
    """A model in evaluation mode that maps files to features.

    Args:
        transform: options for :func:`vim.data.eval_transform`.
        block: the index of the block whose map of tokens is wanted, -1 for the last; None for the pooled features
            before the head.

    Raises:
        UserError: the model has no such block, or has no maps.
    """

    def __init__(self, model: VisionModel, transform: Section, block: int | None = None) -> None:
        if block is not None and not hasattr(model, "forward_intermediates"):
            raise UserError(f"a {type(model).__name__} has no maps of its blocks: leave out --map")
        self.model, self.block = model.eval(), block
        self.num_frames, self.mode = num_frames(model), image_mode(model)
        self.transform = (video_eval_transform if self.num_frames else eval_transform)(model, transform)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model.to(self.device)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """Map images (b, c, h, w), or clips (b, c, t, h, w), to :attr:`Features.values`."""
        images = images.to(self.device, non_blocking=True)
        if self.block is None:
            return self.model.forward_head(self.model.forward_features(images), pre_logits=True).cpu()
        try:
            maps = self.model.forward_intermediates(images, indices=[self.block], norm=True, intermediates_only=True)
        except AssertionError as error:  # timm's, of an index
            raise UserError(f"--map {self.block}: the model has no such block ({describe(error)})") from error
        return maps[0].cpu()

    def batches(self, paths: Sequence[Path], batch_size: int, num_workers: int) -> Iterator[Features]:
        """Yield the features of files, in order.

        Raises:
            UserError: features are not finite.
        """
        dataset: ImageFiles | Videos = ImageFiles(paths, self.mode)
        if self.num_frames:
            videos = [Video(str(path), index) for index, path in enumerate(paths)]
            dataset = Videos(videos, self.mode, is_training=False, num_frames=self.num_frames)
        loader = create_loader(
            dataset,
            self.transform,
            batch_size=batch_size,
            num_workers=num_workers,
            seed=0,
            share=Share(),
            is_training=False,
        )
        for images, indices, unreadable in loader:
            read = indices != IGNORED
            values = self(images[read]) if read.any() else torch.empty(0)
            for index, row in zip(indices[read].tolist(), values, strict=True):
                if not row.isfinite().all():
                    raise UserError(f"the features of {paths[index]} are not finite: are the weights sound?")
            yield Features(indices[read].tolist(), values, unreadable)


class Writer:
    """Writes features to `features_00000.safetensors`, `features_00001.safetensors`, ... and at the end the index.

    Each file holds one tensor, `features`. The index has a row a file of the input: its path, the features' file, and
    the row in it. A folder with an index is complete.

    Args:
        about: strings for the header of each file.

    Raises:
        UserError: the folder holds features already, or cannot be written to.
    """

    def __init__(self, folder: Path, about: dict[str, str]) -> None:
        make_folder(folder)
        if (folder / INDEX).exists():
            raise UserError(f"{folder} holds features already: name another folder by --out, or delete {INDEX} in it")
        self.folder, self.about = folder, about
        self.waiting: list[Tensor] = []
        self.files = 0
        self.rows: list[dict[str, object]] = []

    def add(self, paths: Sequence[Path], values: Tensor) -> None:
        """Add the features of files, (b, ...)."""
        start = sum(map(len, self.waiting))
        for row, path in enumerate(paths, start):
            self.rows.append({"path": printable(path), "file": self._name(), "row": row})
        if paths:
            self.waiting.append(values)
        if sum(part.nbytes for part in self.waiting) >= FILE_BYTES:
            self._write()

    def _name(self) -> str:
        return f"features_{self.files:05}.safetensors"

    def _write(self) -> None:
        with written_whole(self.folder / self._name()) as beside:
            save_file({"features": torch.cat(self.waiting)}, beside, metadata=self.about)
        self.files += 1
        self.waiting = []

    def close(self) -> None:
        """Write what is waiting, and the index.

        Raises:
            UserError: there are no features.
        """
        if not self.rows:
            raise UserError("no file could be read: there are no features to write")
        if self.waiting:
            self._write()
        write_csv(self.folder / INDEX, self.rows)
