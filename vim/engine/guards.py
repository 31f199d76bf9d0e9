"""What can go wrong in a run, and the advice that its error gives."""

import errno
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from vim.errors import UserError, describe, one_line


@contextmanager
def advice(work_dir: Path) -> Iterator[None]:
    """Turn full memory, dead workers and full disks into a UserError that says what to do. Saves stay whole."""
    resume = f"then go on with --resume from {work_dir}"
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            "the GPU's memory is full: halve data.batch_size and double train.accumulate, which leaves the recipe as "
            f"it is, or set train.grad_checkpointing=True; {resume}"
        ) from error
    except (RuntimeError, ConnectionError, EOFError) as error:
        # ConnectionError, EOFError: the worker died while it sent a batch
        text = str(error)
        if text.startswith("Caught ") or isinstance(error, RuntimeError) and "DataLoader worker" not in text:
            raise  # "Caught ..." is an exception raised inside a worker that is still alive
        raise UserError(
            f"a process that loads images died ({one_line(describe(error))}): lower data.num_workers if memory is "
            f"short; {resume}"
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO):
            raise
        raise UserError(f"cannot write to {work_dir} ({error.strerror}): make room there; {resume}") from error


class StopRequest:
    """Records SIGTERM, which a cluster sends some time before it kills."""

    def __init__(self) -> None:
        self.came = False

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Record the signal within the context instead of ending the process."""

        def note(number: int, frame: FrameType | None) -> None:
            self.came = True

        before = signal.signal(signal.SIGTERM, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)


@torch.no_grad()
def first_bad_layer(model: nn.Module, run: Callable[[], Any]) -> str:
    """Return the first layer whose output in `run` is not finite; else the last whose gradient is not finite."""
    bad: list[str] = []

    def look(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not output.isfinite().all():
                bad.append(name)

        return hook

    handles = [module.register_forward_hook(look(name)) for name, module in model.named_modules() if name]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    if bad:
        return f"the output of {bad[0]}"
    for name, parameter in reversed(list(model.named_parameters())):
        if parameter.grad is not None and not parameter.grad.isfinite().all():
            return f"the gradient of {name}"
    return "the loss"
