"""Data sets of timm's without random access: Hugging Face's streams, WebDataset's shards, tfds."""

import functools
import hashlib
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

from PIL import Image
from timm.data.dataset import IterableImageDataset
from torch.utils.data import IterableDataset

from vim.data.images import UNDECODABLE, convert, reason
from vim.errors import UserError, describe

_UNREADABLE = (*UNDECODABLE, KeyError)

Sample: TypeAlias = tuple[Image.Image | UserError, int]
Reader: TypeAlias = Any  # timm's: importing their classes imports optional packages


class Stream(IterableDataset[Sample]):
    """A stream whose order depends on the epoch only, and that continues after a broken image.

    Iterating yields (PIL image, class index), or (UserError, any number) for an image that cannot be read.

    Args:
        mode: PIL's mode for the images: "RGB", or "L" for grey.

    Attributes:
        broken_shards: a message for each shard that could not be read to its end, so far.
    """

    def __init__(self, dataset: IterableImageDataset, mode: str) -> None:
        self.dataset, self.mode = dataset, mode
        self.broken_shards: list[str] = []

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def num_images(self) -> int:
        """The number of images, over all processes."""
        return self.dataset.reader.num_samples

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration has."""
        self.dataset.set_epoch(epoch)

    def set_workers(self, number: int) -> None:
        """Set the number of a loader's workers, so that each yields the same number of whole batches."""
        self.dataset.set_loader_cfg(num_workers=number)

    def __iter__(self) -> Iterator[Sample]:
        reader: Reader = self.dataset.reader
        empty = True
        try:
            reader._lazy_init()  # again, or the state of its shuffling would carry over from epoch to epoch
            for sample in self._samples(reader):
                empty = False
                yield sample
            while self.broken_shards and not reader.is_training:  # no later image reports these
                yield UserError(self.broken_shards.pop()), 0
        except RuntimeError as error:  # raised by the reader, about its shards
            raise UserError(f"cannot read the data set: {describe(error)}") from error
        if empty and reader.is_training:
            raise UserError("the data set has fewer shards than processes that read it: lower data.num_workers")

    def _samples(self, reader: Reader) -> Iterator[Sample]:
        kind = type(reader).__name__
        if kind == "ReaderHfids":
            return self._decode(reader)
        if kind == "ReaderWds":
            return self._expand(reader)
        return iter(reader)

    def _decode(self, reader: Reader) -> Iterator[Sample]:
        """Decode a Hugging Face stream's images here: an error inside the reader would end the stream."""
        from datasets import Image as Feature

        reader.ds = reader.ds.cast_column(reader.input_key, Feature(decode=False))
        reader.input_img_mode = ""
        decode = Feature().decode_example
        for stored, label in reader:
            if stored is None:
                yield UserError("cannot read an image: the data set has none for a row"), label
                continue
            image: Image.Image | UserError
            try:
                image = convert(decode(stored), self.mode)
            except _UNREADABLE as error:
                name = stored.get("path") or f"the image of SHA-1 {hashlib.sha1(stored['bytes'] or b'').hexdigest()}"
                image = UserError(f"cannot read {name} ({reason(error)})")
            yield image, label

    def _expand(self, reader: Reader) -> Iterator[Sample]:
        """Report images and unread parts of shards, which timm's pipeline of WebDataset skips silently."""
        import webdataset

        def note(error: Exception) -> bool:
            shard = next((argument for argument in reversed(error.args) if isinstance(argument, str)), "a shard")
            state = "missing" if isinstance(error, FileNotFoundError) else "damaged"
            self.broken_shards.append(f"cannot read all of {shard}: it is {state}")
            return True

        # Replace the pipeline's handlers of errors, and its decoding, by ones that report.
        for stage in reader.ds.pipeline:
            if "handler" in getattr(stage, "kw", {}):
                stage.kw["handler"] = note
        decode = reader.ds.pipeline[-2].args[0]
        reader.ds.pipeline[-2] = webdataset.map(_Named(decode, self.mode))
        if not reader.is_training:  # or timm would repeat and drop images to give each process the same number
            reader.dist_num_replicas = 1
        return iter(reader)


class _Named:
    """timm's decoding of a sample; for an image that cannot be decoded, a UserError with its name."""

    def __init__(self, decode: Callable[..., dict], mode: str) -> None:
        self.decode, self.mode = functools.partial(decode, image_mode=""), mode

    def __call__(self, sample: dict[str, str]) -> dict[str, object] | None:
        try:
            decoded = self.decode(sample)
            return decoded and {**decoded, "jpg": convert(decoded["jpg"], self.mode)}
        except _UNREADABLE as error:
            name = f"{sample['__key__']} of {sample['__url__']}"
            return {"jpg": UserError(f"cannot read {name} ({reason(error)})"), "target": 0}
