"""The images or clips that classification and masked pre-training run on."""

import logging
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, IterableDataset

from vim.data import Batch, Splits
from vim.data.loading import EpochBatches
from vim.engine.build import build_loader
from vim.engine.launch import share_of
from vim.errors import UserError
from vim.options import ImageRecipe
from vim.typing import VisionModel

_logger = logging.getLogger(__name__)


class Images:
    """Loaders of both parts of a recipe's data; and a line for each image in them that cannot be read.

    Args:
        work_dir: gets `unreadable.txt` when there is such an image.
    """

    def __init__(
        self, recipe: ImageRecipe, splits: Splits, model: VisionModel, work_dir: Path, accelerator: Accelerator
    ) -> None:
        self.data, self.train_options, self.accelerator = recipe.data, recipe.train, accelerator
        self.path = work_dir / "unreadable.txt"
        share = share_of(accelerator)
        self.train = build_loader(self.data, splits.train, model, share, seed=recipe.train.seed, is_training=True)
        self.held_out = build_loader(self.data, splits.held_out, model, share, is_training=False)
        self.batches_per_epoch = len(self.train)  # later the loader's length counts from where an epoch was resumed
        self.notes: dict[str, list[str]] = {"train": [], "val": []}  # in the order they were met

    def batches(self, epoch: int, start: int) -> Iterator[Batch]:
        """Yield the training batches of an epoch from number `start` on.

        Raises:
            UserError: a stream ended early, or too many images cannot be read.
        """
        sampler = self.train.batch_sampler
        if isinstance(sampler, EpochBatches):
            sampler.epoch, sampler.start = epoch, start
            batches: Iterator[Batch] = iter(self.train)
        else:  # a stream can only be read from its beginning
            self.train.dataset.epoch = epoch  # type: ignore[attr-defined]
            batches = islice(self.train, start, None)
        done = start
        for batch in batches:
            self.note("train", batch.unreadable)
            yield batch
            done += 1
        if done < self.batches_per_epoch:
            raise UserError(
                f"epoch {epoch + 1} ended after {done} of {self.batches_per_epoch} batches: the stream has "
                f"fewer than the {len(self.train.dataset)} images it was declared to have"  # type: ignore[arg-type]
            )

    def note(self, part: str, lines: Sequence[str], *, log: bool = True) -> None:
        """Log the lines that are new, and keep them.

        Raises:
            UserError: more of the part's images cannot be read than data.max_unreadable.
        """
        known = self.notes[part]
        new = [line for line in dict.fromkeys(lines) if line not in known]
        known += new
        if new and log:
            for line in new:
                _logger.warning("left out: %s", line)
            with self.path.open("a") as file:
                file.writelines(f"{line}\n" for line in new)
        count, most = _count(self.train if part == "train" else self.held_out), self.data.max_unreadable
        if new and len(known) > most * count:
            raise UserError(
                f"{len(known)} of {count} images cannot be read, more than data.max_unreadable ({most:.2%}): "
                f"see {self.path}; {'; '.join(known)}"
            )

    def note_epoch(self, held_out: Sequence[str]) -> None:
        """Share the lines of an epoch between the processes; each has logged its own of the training part."""
        self.note("train", gather_object(self.notes["train"]), log=False)
        self.note("val", held_out, log=self.accelerator.is_main_process)

    def order(self) -> dict[str, object]:
        """Return facts that the order of the images within an epoch follows from."""
        dataset, processes = self.train.dataset.dataset, self.accelerator.num_processes  # type: ignore[attr-defined]
        order: dict[str, object] = {
            "the number of images": len(dataset),
            "images an update": self.data.batch_size * processes * self.train_options.accumulate,
            "data.repeats": self.data.repeats,
            "data.samples": self.data.samples,
            "train.seed": self.train_options.seed,
        }
        if self.data.sampling != "shuffle":
            order["data.sampling"] = self.data.sampling
        if isinstance(dataset, IterableDataset):  # its images are spread over the workers that read it
            order |= {"data.num_workers": self.data.num_workers, "processes": processes}
        return order


def teacher_facts(recipe: ImageRecipe) -> dict[str, object]:
    """Return the options of the teacher, but not where its weights are, by the names users know them by."""
    options = (recipe.teacher or {}).items()
    return {f"teacher.{name}": value for name, value in options if name != "pretrained_cfg_overlay"}


def _count(loader: DataLoader[Batch]) -> int:
    dataset = loader.dataset.dataset  # type: ignore[attr-defined]
    return getattr(dataset, "num_images", len(dataset))
