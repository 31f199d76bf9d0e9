"""Building the model that a checkpoint names, so that a small file can neither take long nor much memory."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from vim.checkpoints import check_fit, of_now
from vim.errors import UserError, describe

MOST_UNSAVED = 2**26  # numbers in a model's tables that are not saved with it

M = TypeVar("M", bound=nn.Module)


def rebuild(make: Callable[[], M], weights: Mapping[str, Tensor], source: Path) -> M:
    """Build the model that a checkpoint names and load its weights.

    The model is built without memory first, so that one that does not fit the weights takes neither memory nor time.

    Raises:
        UserError: the model cannot be built, or the weights do not fit it.
    """
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in weights.values()}
    if sum(tensor.nbytes for tensor in weights.values()) > 8 * sum(storages.values()):
        raise UserError(f"{source} is no sound checkpoint: its tensors share their numbers with one another")
    with building(source), torch.device("meta"), _at_most(10_000 + 20 * len(weights)):
        plan = make()
    weights = of_now(weights, plan)
    check_fit(weights, plan, source)
    saved = plan.state_dict()
    unsaved = sum(buffer.numel() for name, buffer in plan.named_buffers() if name not in saved)
    if unsaved > MOST_UNSAVED:
        raise UserError(f"{source} names a model with tables of {unsaved} numbers: at most {MOST_UNSAVED} expected")
    with building(source):
        model = make()
    model.load_state_dict(weights)
    return model


@contextmanager
def building(source: Path, what: str = "a model") -> Iterator[None]:
    """Turn any exception of this block into a UserError that names the file, and what it asks for."""
    try:
        yield
    except Exception as error:  # timm and the models raise many kinds
        raise UserError(f"{source} names {what} that cannot be built: {describe(error)}") from error


@contextmanager
def _at_most(most: int) -> Iterator[None]:
    """Raise ValueError when the modules built in this block have more parts than that, submodules and tensors."""
    parts = 0

    def count(*_: object) -> None:
        nonlocal parts
        parts += 1
        if parts > most:
            raise ValueError(f"it has more than {most} parts, and the weights are of fewer")

    registers = (
        register_module_module_registration_hook,
        register_module_parameter_registration_hook,
        register_module_buffer_registration_hook,
    )
    handles = [register(count) for register in registers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
