"""Batches in which every random choice follows from the seed, the epoch and the image: not from workers or processes.

A run that goes on in the middle of an epoch, or on other numbers of workers, sees what it would have seen; and so do
several processes, together, what one would at the same number of images a step.
"""

import itertools
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from vim.data.streams import Stream
from vim.errors import UserError

IGNORED = -1  # the label of what is not to be counted: padding, an image that cannot be read
PADDING = -1  # the repeat of a key that is there to make batches equally long
MOST_UNREADABLE = 100  # in a row


class Key(NamedTuple):
    """Which image, in which epoch, for the how-manieth time in it."""

    epoch: int
    image: int
    repeat: int


class Batch(NamedTuple):
    """images (b, c, h, w), or clips (b, c, t, h, w); labels (b,); and a line for each that could not be read."""

    images: Tensor
    labels: Tensor
    unreadable: list[str]


@dataclass(frozen=True)
class Share:
    """Which of several processes this is."""

    rank: int = 0
    world: int = 1


def seed_all(*numbers: int) -> None:
    """Seed Python's, NumPy's and PyTorch's generators with a hash of numbers."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


class Prepared(Dataset[Any]):
    """The images of a data set after a transform; the random choices of both follow from the seed and the key.

    Args:
        dataset: yields (PIL image, class index), or of videos (list of PIL images, class index); a UserError is one
            that cannot be read.
        substitute: give the next readable image for one that cannot be read; else zeros, labelled `IGNORED`.
    """

    def __init__(self, dataset: Any, transform: Callable[[Any], Tensor], seed: int, *, substitute: bool) -> None:
        self.dataset, self.transform, self.seed, self.substitute = dataset, transform, seed, substitute

    def __getitem__(self, key: Key) -> tuple[Tensor, int, list[str]]:
        unreadable = []
        for offset in range(min(len(self.dataset), MOST_UNREADABLE) if self.substitute else 1):
            index = (key.image + offset) % len(self.dataset)
            seed_all(self.seed, key.epoch, index, max(key.repeat, 0))
            try:
                image, label = self.dataset[index]
            except UserError as error:
                unreadable.append(str(error))
                continue
            return self.transform(image), IGNORED if key.repeat == PADDING else label, unreadable
        if self.substitute:
            raise UserError(f"{len(unreadable)} images in a row cannot be read: {unreadable[0]}")
        return torch.empty(0), IGNORED, [] if key.repeat == PADDING else unreadable


class PreparedStream(IterableDataset[Any]):
    """Likewise for a data set that can only be read from its beginning; here they follow from the workers' number too.

    Args:
        dataset: a :class:`vim.data.streams.Stream`.
        substitute: give the readable image before one that cannot be read, or after it, once more.

    Attributes:
        epoch: which epoch the next iteration is of.
    """

    def __init__(
        self, dataset: Any, transform: Callable[[Any], Tensor], seed: int, share: Share, *, substitute: bool
    ) -> None:
        self.dataset, self.transform, self.seed, self.share = dataset, transform, seed, share
        self.substitute = substitute
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[tuple[Tensor, int, list[str]]]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        self.dataset.set_epoch(self.epoch)
        for position, (image, label, unreadable) in enumerate(self._readable()):
            seed_all(self.seed, self.epoch, self.share.rank * workers + number, position)
            unreadable += self.dataset.broken_shards
            self.dataset.broken_shards.clear()
            yield (torch.empty(0) if image is None else self.transform(image)), label, unreadable

    def _readable(self) -> Iterator[tuple[Any, int, list[str]]]:
        """The samples, and a substitute, or (None, `IGNORED`), for each that cannot be read."""
        last: tuple[Any, int] | None = None
        early: list[str] = []  # what could not be read before the first image that could
        for image, label in self.dataset:
            if not isinstance(image, UserError):
                yield from [(image, label, [line]) for line in early]
                early = []
                last = image, label
                yield *last, []
            elif not self.substitute:
                yield None, IGNORED, [str(image)]
            elif last:
                yield *last, [str(image)]
            else:
                early.append(str(image))
                if len(early) == MOST_UNREADABLE:
                    break
        if early:
            raise UserError(f"{len(early)} images in a row cannot be read: {early[0]}")


class EpochBatches:
    """The keys of an epoch's batches, for one of several processes; the last, incomplete batch is left out.

    The processes' batches of a step are together what one process would have at their number of images. With
    `repeats` an image comes that often in an epoch, each time prepared anew, and the epoch is no longer for it:
    a multiple of 256 images, as in DeiT's repeated augmentation (https://arxiv.org/abs/1901.09335). With `samples` it
    comes that often as well, and the epoch is so much longer, as in video training after VideoMAE
    (https://arxiv.org/abs/2203.12602).

    Attributes:
        epoch, start: which epoch the next iteration is of, and from which batch on.
    """

    def __init__(
        self, count: int, batch_size: int, seed: int, share: Share, *, repeats: int = 1, samples: int = 1
    ) -> None:
        self.count, self.batch_size, self.seed, self.share = count, batch_size, seed, share
        self.repeats = repeats * samples
        self.epoch = self.start = 0
        used = count if repeats == 1 or count < 256 else count // 256 * 256
        self.steps = used * samples // (batch_size * share.world)

    def __len__(self) -> int:
        return self.steps - self.start

    def __iter__(self) -> Iterator[list[Key]]:
        hashed = np.random.SeedSequence((self.seed, self.epoch)).generate_state(1)[0]
        order = torch.randperm(self.count, generator=torch.Generator().manual_seed(int(hashed))).tolist()
        together = self.batch_size * self.share.world
        for step in range(self.start, self.steps):
            places = range(step * together + self.share.rank, (step + 1) * together, self.share.world)
            yield [Key(self.epoch, order[i // self.repeats], i % self.repeats) for i in places]


class EvaluationBatches:
    """The keys of every image once, spread over the processes; all have as many batches, of as many images."""

    def __init__(self, count: int, batch_size: int, share: Share) -> None:
        self.count, self.batch_size, self.share = count, batch_size, share

    def __len__(self) -> int:
        return -(-self.count // (self.batch_size * self.share.world))

    def __iter__(self) -> Iterator[list[Key]]:
        own = range(self.share.rank, -(-self.count // self.share.world) * self.share.world, self.share.world)
        keys = [Key(0, i, 0) if i < self.count else Key(0, i % self.count, PADDING) for i in own]
        yield from (keys[i : i + self.batch_size] for i in range(0, len(keys), self.batch_size))


def collate(samples: list[tuple[Tensor, int, list[str]]]) -> Batch:
    """Stack samples; what could not be read is zeros."""
    images, labels, unreadable = zip(*samples, strict=True)
    shape = next((image.shape for image in images if image.numel()), None)
    if shape is not None:
        images = tuple(image if image.numel() else image.new_zeros(shape) for image in images)
    return Batch(torch.stack(images), torch.tensor(labels), list(itertools.chain(*unreadable)))


def _outlive_sigterm(worker: int) -> None:
    """A cluster signals every process of a run: the one that trains saves and ends, and its workers at its signal."""

    def wait() -> None:
        while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
            pass
        os._exit(0)

    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    threading.Thread(target=wait, daemon=True).start()


def create_loader(
    dataset: Any,
    transform: Callable[[Any], Tensor],
    *,
    batch_size: int,
    num_workers: int,
    seed: int,
    share: Share,
    is_training: bool,
    repeats: int = 1,
    samples: int = 1,
) -> DataLoader[Any]:
    """A loader of :class:`Batch`. In training, its `batches` say which epoch and from where; see :class:`EpochBatches`.

    Raises:
        UserError: there are fewer images than in a batch; or repeats or samples of a stream.
    """
    options: dict[str, Any] = {
        "num_workers": num_workers,
        "pin_memory": torch.cuda.is_available(),
        "collate_fn": collate,
        "worker_init_fn": _outlive_sigterm,
    }
    if isinstance(dataset, Stream):
        if repeats > 1 or samples > 1:
            raise UserError("data.repeats and data.samples must be 1 for a stream, which gives each image once")
        dataset.set_workers(num_workers)
        stream = PreparedStream(dataset, transform, seed, share, substitute=is_training)
        return DataLoader(stream, batch_size=batch_size, drop_last=is_training, **options)
    batches = (
        EpochBatches(len(dataset), batch_size, seed, share, repeats=repeats, samples=samples)
        if is_training
        else EvaluationBatches(len(dataset), batch_size, share)
    )
    if len(batches) == 0:
        raise UserError(
            f"data.batch_size is {batch_size} on {share.world} processes, and there are {len(dataset)} images to train "
            f"on: --cfg-options data.batch_size={len(dataset) // share.world}, or less"
        )
    prepared = Prepared(dataset, transform, seed, substitute=is_training)
    return DataLoader(prepared, batch_sampler=batches, persistent_workers=num_workers > 0, **options)
