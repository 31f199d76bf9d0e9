"""Data sets of timm's that can only be read from their beginning: Hugging Face's streams, WebDataset's shards, tfds."""

import functools
import hashlib
from collections.abc import Iterator
from typing import Any

from torch.utils.data import IterableDataset

from vim.data.images import UNDECODABLE, convert, reason
from vim.errors import UserError, describe

_UNREADABLE = (*UNDECODABLE, KeyError)


class Stream(IterableDataset[Any]):
    """A stream that has, in an epoch, the same order each time it is read, and goes on after an image that is broken.

    Args:
        dataset: timm's IterableImageDataset.
        mode: PIL's name for the kind of images wanted: "L" for grey.

    Iterating yields (PIL image, class index), or (UserError, anything) for an image that cannot be read.

    Attributes:
        broken_shards: a line for each shard that could not be read, or not to its end, so far.
    """

    def __init__(self, dataset: Any, mode: str) -> None:
        self.dataset, self.mode = dataset, mode
        self.broken_shards: list[str] = []

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def num_images(self) -> int:
        """How many there are for all processes together."""
        return self.dataset.reader.num_samples

    def set_epoch(self, epoch: int) -> None:
        """Which epoch's order is read next."""
        self.dataset.set_epoch(epoch)

    def set_workers(self, number: int) -> None:
        """By how many processes it is read: each gives as many whole batches."""
        self.dataset.set_loader_cfg(num_workers=number)

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        reader: Any = self.dataset.reader
        empty = True
        try:
            reader._lazy_init()  # anew: what it shuffles with else has a state that goes on from epoch to epoch
            for sample in self._samples(reader):
                empty = False
                yield sample
            while self.broken_shards and not reader.is_training:  # found after its last image
                yield UserError(self.broken_shards.pop()), 0
        except RuntimeError as error:  # of the reader's, which knows of its shards
            raise UserError(f"cannot read the data set: {describe(error)}") from error
        if empty and reader.is_training:
            raise UserError("the data set has fewer shards than processes that read it: lower data.num_workers")

    def _samples(self, reader: Any) -> Iterator[tuple[Any, Any]]:
        kind = type(reader).__name__  # the modules of these need packages that may not be there
        if kind == "ReaderHfids":
            return self._decode(reader)
        if kind == "ReaderWds":
            return self._expand(reader)
        return iter(reader)

    def _decode(self, reader: Any) -> Iterator[tuple[Any, Any]]:
        """Decode images here: an error within the reader would end it."""
        from datasets import Image as Feature

        reader.ds = reader.ds.cast_column(reader.input_key, Feature(decode=False))
        reader.input_img_mode = ""
        decode = Feature().decode_example
        for stored, label in reader:
            if stored is None:
                yield UserError("cannot read an image: the data set has none for a row"), label
                continue
            image: Any
            try:
                image = convert(decode(stored), self.mode)
            except _UNREADABLE as error:
                name = stored.get("path") or f"the image of SHA-1 {hashlib.sha1(stored['bytes'] or b'').hexdigest()}"
                image = UserError(f"cannot read {name} ({reason(error)})")
            yield image, label

    def _expand(self, reader: Any) -> Iterator[tuple[Any, Any]]:
        """Name what timm's pipeline drops: images, and the rest of shards."""
        import webdataset

        def note(error: Exception) -> bool:
            shard = next((argument for argument in reversed(error.args) if isinstance(argument, str)), "a shard")
            state = "missing" if isinstance(error, FileNotFoundError) else "damaged"
            self.broken_shards.append(f"cannot read all of {shard}: it is {state}")
            return True

        for stage in reader.ds.pipeline:
            if "handler" in getattr(stage, "kw", {}):
                stage.kw["handler"] = note
        decode = reader.ds.pipeline[-2].args[0]
        reader.ds.pipeline[-2] = webdataset.map(_Named(decode, self.mode))
        if not reader.is_training:  # timm would have all processes give as many: some twice, and some not at all
            reader.dist_num_replicas = 1
        return iter(reader)


class _Named:
    """timm's decoding, which says what it cannot."""

    def __init__(self, decode: Any, mode: str) -> None:
        self.decode, self.mode = functools.partial(decode, image_mode=""), mode

    def __call__(self, sample: dict[str, Any]) -> Any:
        try:
            decoded = self.decode(sample)
            return decoded and {**decoded, "jpg": convert(decoded["jpg"], self.mode)}
        except _UNREADABLE as error:
            name = f"{sample['__key__']} of {sample['__url__']}"
            return {"jpg": UserError(f"cannot read {name} ({reason(error)})"), "target": 0}
