"""What can go wrong in a run, and the advice that its error gives."""

import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from vim.errors import UserError, describe, one_line

# the signals that end a run, and its exit status once it is saved: SIGTERM is a cluster's, which gets what it asked for
STATUS = {signal.SIGTERM: 0, signal.SIGINT: 130, signal.SIGHUP: 129}
REMEDIES = {
    "make room there": (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO),
    "change its permissions": (errno.EROFS, errno.EACCES, errno.EPERM),
    "put the folder back": (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ESTALE),
}


@contextmanager
def advice(work_dir: Path) -> Iterator[None]:
    """Turn full memory, dead workers, full disks, batches of one into a UserError with advice. Saves stay whole."""
    resume = f"then go on with --resume from {work_dir}"
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            "the GPU's memory is full: halve data.batch_size and double train.accumulate, which leaves the recipe as "
            f"it is, or set train.grad_checkpointing=True; {resume}"
        ) from error
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise UserError(
            "a batch norm of the model cannot be trained on one value a channel: set data.batch_size to at least 2, "
            "or a larger model.img_size"
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
        ours = error.filename is None or Path(str(error.filename)).parent == work_dir
        todo = next((todo for todo, numbers in REMEDIES.items() if error.errno in numbers), None)
        if todo is None or not ours:
            raise
        raise UserError(f"cannot write to {work_dir} ({error.strerror}): {todo}; {resume}") from error


class StopRequest:
    """Records the first signal that asks a run to end: a cluster sends one some time before it kills.

    Args:
        alone: whether a second Ctrl-C ends the process at once. With several, their launcher passes on the first once
            more, and ends those that do not end.

    Attributes:
        came: the signal, if one came.
    """

    def __init__(self, *, alone: bool) -> None:
        self.alone = alone
        self.came: signal.Signals | None = None

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Record the signals within the context instead of ending the process. Only the main thread may do so."""
        before = {number: signal.getsignal(number) for number in STATUS}
        numbers = [number for number, handler in before.items() if handler != signal.SIG_IGN]  # as under nohup
        if threading.current_thread() is not threading.main_thread():
            numbers = []
        for number in numbers:
            signal.signal(number, self._note)
        try:
            yield
        finally:
            for number in numbers:
                signal.signal(number, before[number])

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.alone and number == self.came == signal.SIGINT:
            raise KeyboardInterrupt(
                "the updates since the last save are lost; go on with the same command and --resume"
            )
        if self.came is None:
            self.came = signal.Signals(number)
            hint = "; once more ends it at once" if self.alone and number == signal.SIGINT else ""
            with suppress(OSError):  # the terminal is gone
                os.write(2, f"{self.came.name}: the run ends after this update or evaluation{hint}\n".encode())

    def leave(self, work_dir: Path) -> NoReturn:
        """End the process, after the run was saved."""
        number = self.came or signal.SIGTERM  # another process of the run got it
        with suppress(OSError):
            sys.stdout.write(
                f"stopped by {number.name}; the run is saved in {work_dir}: go on with the same command and --resume\n"
            )
            sys.stdout.flush()
        sys.exit(STATUS[number])


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
