"""Data sets of timm's that can only be read from their beginning: Hugging Face's streams, WebDataset's shards, tfds."""

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

from PIL import Image, UnidentifiedImageError
from timm.data.readers.reader_hfids import ReaderHfids
from timm.data.readers.reader_wds import ReaderWds
from torch.utils.data import IterableDataset

from vim.errors import UserError, describe

_UNREADABLE = (OSError, SyntaxError, ValueError, KeyError, Image.DecompressionBombError)


class Stream(IterableDataset[Any]):
    """A stream that has, in an epoch, the same order each time it is read, and goes on after an image that is broken.

    Args:
        dataset: timm's IterableImageDataset.
        mode: PIL's name for the kind of images wanted: "L" for grey.

    Iterating yields (PIL image, class index), or (UserError, anything) for an image that cannot be read.
    """

    def __init__(self, dataset: Any, mode: str) -> None:
        self.dataset, self.mode = dataset, mode

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
        except RuntimeError as error:  # of the reader's, which knows of its shards
            raise UserError(f"cannot read the data set: {describe(error)}") from error
        if empty and reader.is_training:
            raise UserError("the data set has fewer shards than processes that read it: lower data.num_workers")

    def _samples(self, reader: Any) -> Iterator[tuple[Any, Any]]:
        if isinstance(reader, ReaderHfids):
            return self._decode(reader)
        if isinstance(reader, ReaderWds):
            self._name_broken_samples(reader)
            if not reader.is_training:  # timm would have all processes give as many: some twice, and some not at all
                reader.dist_num_replicas = 1
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
            try:
                image = decode(stored).convert(self.mode)
            except _UNREADABLE as error:
                name = stored.get("path") or f"the image of SHA-1 {hashlib.sha1(stored['bytes'] or b'').hexdigest()}"
                image = UserError(f"cannot read {name} ({_reason(error)})")
            yield image, label

    @staticmethod
    def _name_broken_samples(reader: Any) -> None:
        """Have the pipeline's last stage but one, which decodes, say what it cannot; timm's drops it."""
        import webdataset

        decode = reader.ds.pipeline[-2].args[0]
        reader.ds.pipeline[-2] = webdataset.map(_Named(decode))


def _reason(error: Exception) -> str:
    """What is wrong with an image, in the same words each time: Pillow's hold an address."""
    return "no image that Pillow knows" if isinstance(error, UnidentifiedImageError) else describe(error)


class _Named:
    def __init__(self, decode: Callable[[dict[str, Any]], Any]) -> None:
        self.decode = decode

    def __call__(self, sample: dict[str, Any]) -> Any:
        try:
            return self.decode(sample)
        except _UNREADABLE as error:
            name = f"{sample['__key__']} of {sample['__url__']}"
            return {"jpg": UserError(f"cannot read {name} ({_reason(error)})"), "target": 0}
