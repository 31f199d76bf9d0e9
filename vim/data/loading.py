"""Batches whose random choices depend on the seed, the epoch and the image only, not on workers or processes.

So a run that resumes in the middle of an epoch, or with another number of workers, continues with the same batches. And
several processes together see the batches that one process would see with the same number of images per step.
"""

import itertools
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from vim.data.streams import Stream
from vim.errors import UserError

IGNORED = -1  # a label that does not count: it is not known, or its image is padding or cannot be read
PADDING = -1  # the `repeat` of a key that pads a batch
MOST_UNREADABLE = 100  # consecutive images

Item: TypeAlias = Any  # a PIL image, or a clip: a list of them
Label: TypeAlias = int | Tensor  # a class index; or of several labels (classes,) int8: 1, 0 or IGNORED
Transform = Callable[[Item], Tensor]


class Items(Protocol):
    """A data set with random access. Reading an item that is damaged raises UserError."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Item, Label]: ...


class Key(NamedTuple):
    """Identifies one draw: the epoch, the image's index, and the count of its earlier draws in the epoch."""

    epoch: int
    image: int
    repeat: int


class Sample(NamedTuple):
    """An image or a clip after its transform."""

    image: Tensor  # (c, h, w) or (c, t, h, w), or empty if it could not be read
    label: Label
    unreadable: list[str]  # a message for each image that could not be read


class Batch(NamedTuple):
    """Stacked samples."""

    images: Tensor  # (b, c, h, w), or clips (b, c, t, h, w)
    labels: Tensor  # (b,) or, if an image may have several, (b, classes)
    unreadable: list[str]  # a message for each image that could not be read

    @property
    def counted(self) -> Tensor:
        """Which images count (b,): those with a label that is known."""
        return (self.labels != IGNORED).view(len(self.labels), -1).any(1)


@dataclass(frozen=True)
class Share:
    """The rank of this process among `world` processes."""

    rank: int = 0
    world: int = 1


def seed_all(*numbers: int) -> None:
    """Seed the generators of Python, NumPy and PyTorch, of all devices, with a hash of these numbers."""
    torch.manual_seed(_seed_cpu(*numbers))


def _seed_cpu(*numbers: int) -> int:
    """Seed the generators of the CPU, and return the seed; a hundredth of the time of `torch.manual_seed`."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    return seed


class Prepared(Dataset[Sample]):
    """Transforms the images of a data set; all random choices depend on the seed and the key.

    Args:
        substitute: replace an unreadable image by the next readable one; else its sample is empty, labelled `IGNORED`.
    """

    def __init__(self, dataset: Items, transform: Transform, seed: int, *, substitute: bool) -> None:
        self.dataset, self.transform, self.seed, self.substitute = dataset, transform, seed, substitute
        self.ignored: Label = getattr(dataset, "ignored", IGNORED)

    def __getitem__(self, key: Key) -> Sample:
        """Read and transform an image.

        Raises:
            UserError: too many consecutive images cannot be read.
        """
        unreadable = []
        for offset in range(min(len(self.dataset), MOST_UNREADABLE) if self.substitute else 1):
            index = (key.image + offset) % len(self.dataset)
            _seed_cpu(self.seed, key.epoch, index, max(key.repeat, 0))
            try:
                image, label = self.dataset[index]
            except UserError as error:
                unreadable.append(str(error))
                continue
            return Sample(self.transform(image), self.ignored if key.repeat == PADDING else label, unreadable)
        if self.substitute:
            raise UserError(f"{len(unreadable)} images in a row cannot be read: {unreadable[0]}")
        return Sample(torch.empty(0), self.ignored, [] if key.repeat == PADDING else unreadable)


class PreparedStream(IterableDataset[Sample]):
    """Transforms the images of a stream; random choices depend on the number of workers and processes too.

    Args:
        substitute: replace an unreadable image by the readable one before it, or at the start by the one after it; else
            its sample is empty, labelled `IGNORED`.

    Attributes:
        epoch: the epoch of the next iteration.
    """

    def __init__(self, dataset: Stream, transform: Transform, seed: int, share: Share, *, substitute: bool) -> None:
        self.dataset, self.transform, self.seed, self.share = dataset, transform, seed, share
        self.substitute = substitute
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[Sample]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        self.dataset.set_epoch(self.epoch)
        for position, (image, label, unreadable) in enumerate(self._readable()):
            _seed_cpu(self.seed, self.epoch, self.share.rank * workers + number, position)
            unreadable += self.dataset.broken_shards
            self.dataset.broken_shards.clear()
            yield Sample(torch.empty(0) if image is None else self.transform(image), label, unreadable)

    def _readable(self) -> Iterator[tuple[Item, int, list[str]]]:
        """The stream's images, with a substitute or (None, `IGNORED`) for each that cannot be read."""
        last: tuple[Item, int] | None = None
        early: list[str] = []  # messages from before the first readable image
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
    """The keys of an epoch's batches, for one of several processes. The last, incomplete batch is dropped.

    In each step the processes' batches together are the batch that a single process would have.

    Args:
        count: the number of images in the data set.
        repeats: draw each image that many times, augmented anew. The epoch keeps its length, so it has fewer distinct
            images; it is rounded down to a multiple of 256, as in DeiT's repeated augmentation
            (https://arxiv.org/abs/1901.09335).
        samples: draw each image that many times, augmented anew, in an epoch that is that many times longer, as in
            video training after VideoMAE (https://arxiv.org/abs/2203.12602).
        weights: (count,) draw each image with a probability in proportion to its weight, independently of the draws
            before; by default each image comes once.

    Attributes:
        epoch: the epoch of the next iteration.
        start: its first batch.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        seed: int,
        share: Share,
        *,
        repeats: int = 1,
        samples: int = 1,
        weights: Tensor | None = None,
    ) -> None:
        self.count, self.batch_size, self.seed, self.share, self.weights = count, batch_size, seed, share, weights
        self.repeats = repeats * samples
        self.epoch = self.start = 0
        used = count if repeats == 1 or count < 256 else count // 256 * 256
        self.steps = used * samples // (batch_size * share.world)

    def __len__(self) -> int:
        return self.steps - self.start

    def __iter__(self) -> Iterator[list[Key]]:
        hashed = np.random.SeedSequence((self.seed, self.epoch)).generate_state(1)[0]
        generator = torch.Generator().manual_seed(int(hashed))
        if self.weights is None:
            drawn = torch.randperm(self.count, generator=generator)
        else:
            drawn = _draw(self.weights, generator)
        order, before = drawn.tolist(), _earlier(drawn).tolist()
        together, repeats = self.batch_size * self.share.world, self.repeats
        for step in range(self.start, self.steps):
            places = range(step * together + self.share.rank, (step + 1) * together, self.share.world)
            drawings = ((i // repeats, i % repeats) for i in places)
            yield [Key(self.epoch, order[i], before[i] * repeats + repeat) for i, repeat in drawings]


def _draw(weights: Tensor, generator: torch.Generator) -> Tensor:
    """Draw as many numbers as there are weights, with replacement; torch.multinomial takes no more than 2 ** 24."""
    ends = weights.double().cumsum(0)
    points = torch.rand(len(weights), dtype=torch.float64, generator=generator) * ends[-1]
    return torch.searchsorted(ends, points, right=True).clamp(max=len(weights) - 1)


def _earlier(drawn: Tensor) -> Tensor:
    """Return for each place how many places before it hold the same number."""
    ordered, places = drawn.sort(stable=True)
    first = torch.searchsorted(ordered, ordered)
    return torch.empty_like(drawn).scatter_(0, places, torch.arange(len(drawn)) - first)


class EvaluationBatches:
    """The keys of every image once, split over the processes.

    A short share is padded, so that all processes have equally many batches of equal sizes.
    """

    def __init__(self, count: int, batch_size: int, share: Share) -> None:
        self.count, self.batch_size, self.share = count, batch_size, share

    def __len__(self) -> int:
        return -(-self.count // (self.batch_size * self.share.world))

    def __iter__(self) -> Iterator[list[Key]]:
        own = range(self.share.rank, -(-self.count // self.share.world) * self.share.world, self.share.world)
        keys = [Key(0, i, 0) if i < self.count else Key(0, i % self.count, PADDING) for i in own]
        yield from (keys[i : i + self.batch_size] for i in range(0, len(keys), self.batch_size))


def collate(samples: list[Sample]) -> Batch:
    """Stack samples; an empty one becomes zeros."""
    images, labels, unreadable = zip(*samples, strict=True)
    shape = next((image.shape for image in images if image.numel()), None)
    if shape is not None:
        images = tuple(image if image.numel() else image.new_zeros(shape) for image in images)
    targets = torch.stack([torch.as_tensor(label) for label in labels])
    return Batch(torch.stack(images), targets, list(itertools.chain(*unreadable)))


def _outlive_signals(worker: int) -> None:
    """Make a loader's worker ignore Ctrl-C and SIGHUP, and SIGTERM unless its parent sends it.

    A cluster or a terminal signals all processes of a run at once. The parent saves first, still reading batches, then
    ends workers.
    """

    def wait() -> None:
        while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
            pass
        os._exit(0)

    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    threading.Thread(target=wait, daemon=True).start()


def create_loader(
    dataset: Items | Stream,
    transform: Transform,
    *,
    batch_size: int,
    num_workers: int,
    seed: int,
    share: Share,
    is_training: bool,
    repeats: int = 1,
    samples: int = 1,
    weights: Tensor | None = None,
) -> DataLoader[Sample]:
    """Build a loader that yields :class:`Batch`.

    In training, set the epoch on its `batch_sampler`, an :class:`EpochBatches`; for a stream, on its `dataset`.

    Args:
        batch_size: of each process.
        share: this process among those of the run.
        repeats, samples, weights: see :class:`EpochBatches`; 1, 1 and None for a stream.

    Raises:
        UserError: the data set has fewer images than a batch, or `repeats` or `samples` is above 1 for a stream.
    """
    load = partial(
        DataLoader,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        collate_fn=collate,
        worker_init_fn=_outlive_signals,
    )
    if isinstance(dataset, Stream):
        if repeats > 1 or samples > 1:
            raise UserError("data.repeats and data.samples must be 1 for a stream, which gives each image once")
        dataset.set_workers(num_workers)
        stream = PreparedStream(dataset, transform, seed, share, substitute=is_training)
        return load(stream, batch_size=batch_size, drop_last=is_training)
    batches = (
        EpochBatches(len(dataset), batch_size, seed, share, repeats=repeats, samples=samples, weights=weights)
        if is_training
        else EvaluationBatches(len(dataset), batch_size, share)
    )
    if len(batches) == 0:
        raise UserError(
            f"data.batch_size is {batch_size} on {share.world} processes, and there are {len(dataset)} images to train "
            f"on: --cfg-options data.batch_size={len(dataset) // share.world}, or less"
        )
    prepared = Prepared(dataset, transform, seed, substitute=is_training)
    return load(prepared, batch_sampler=batches, persistent_workers=num_workers > 0)
