"""Data sets of timm's that can only be read from their beginning: Hugging Face's streams, WebDataset's shards, tfds."""

from collections.abc import Callable, Iterator
from typing import Any

from PIL import Image
from timm.data.readers.reader_hfids import ReaderHfids
from timm.data.readers.reader_wds import ReaderWds
from torch.utils.data import IterableDataset

from vim.errors import UserError, describe

_UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


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
        return iter(reader)

    def _decode(self, reader: Any) -> Iterator[tuple[Any, Any]]:
        """Decode images here: an error within the reader would end it."""
        from datasets import Image as Feature

        reader.ds = reader.ds.cast_column(reader.input_key, Feature(decode=False))
        reader.input_img_mode = ""
        decode = Feature().decode_example
        for number, (stored, label) in enumerate(reader):
            try:
                image = decode(stored).convert(self.mode)
            except _UNREADABLE as error:
                image = UserError(f"cannot read {stored.get('path') or f'image {number} of a worker'} ({error})")
            yield image, label

    @staticmethod
    def _name_broken_samples(reader: Any) -> None:
        """Have the pipeline's last stage but one, which decodes, say what it cannot; timm's drops it."""
        import webdataset

        decode = reader.ds.pipeline[-2].args[0]
        reader.ds.pipeline[-2] = webdataset.map(_Named(decode))


class _Named:
    def __init__(self, decode: Callable[[dict[str, Any]], Any]) -> None:
        self.decode = decode

    def __call__(self, sample: dict[str, Any]) -> Any:
        try:
            return self.decode(sample)
        except _UNREADABLE as error:
            name = f"{sample['__key__']} of {sample['__url__']}"
            return {"jpg": UserError(f"cannot read {name} ({error})"), "target": -1}
