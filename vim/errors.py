"""Errors that a user sees as one line instead of a traceback."""

import io
import os
import signal
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import FrameType, ModuleType, TracebackType

# the packages that each extra of setup.cfg brings, by the names that Python imports
EXTRAS = {
    "train": ("accelerate", "matplotlib", "mmengine", "rich", "sklearn"),
    "video": ("av", "decord"),
    "series": ("pandas", "statsmodels", "vega_datasets"),
    "export": ("onnx", "onnxruntime", "onnxscript"),
    "demo": ("gradio", "mlxtend"),
    "streams": ("datasets", "webdataset"),
}
IN_A_CLONE = (Path(__file__).parents[1] / "setup.cfg").is_file()
PIP_NAMES = {"sklearn": "scikit-learn", "vega_datasets": "vega-datasets"}  # where pip has another name


class UserError(ValueError):
    """A mistake in the user's input. The message says in one line what was expected, what came, and what to do."""

    def __init__(self, message: str) -> None:
        # a data loader re-raises a worker's exception with the traceback before the message
        super().__init__(one_line(message.rsplit(f"{type(self).__name__}: ", 1)[-1]))


def one_line(message: str) -> str:
    """Join the lines of a message, escape control characters, and cut it to 500: torch may append a list of names."""
    line = printable(" ".join(part.strip() for part in message.strip().splitlines()))
    return line if len(line) <= 500 else f"{line[:500]}..."


def printable(text: object) -> str:
    """The text with every character escaped that a terminal would obey or could not encode, such as a newline."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in str(text))


def closest(name: str, names: Iterable[str]) -> str:
    """The names that a misspelt name may stand for, the closest first: "(the closest: vim_tiny)"."""
    return f"(the closest: {', '.join(get_close_matches(name, list(names))) or 'none'})"


def no_such(what: str, path: Path, others: Iterable[str] = ()) -> UserError:
    """The error for a file that does not exist; it has the closest names in the folder, and those among others."""
    names = [one.name for one in path.parent.iterdir()] if path.parent.is_dir() and not path.exists() else []
    near = get_close_matches(path.name, names) + get_close_matches(str(path), list(others))
    hint = f" (the closest: {', '.join(near)})" if near else ""
    return UserError(f"no such {what}: {path}{hint}")


def describe(error: Exception) -> str:
    """The message of a library's exception, or the exception's name where it has no message."""
    return f"{type(error).__name__}: {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__


def missing(package: str, purpose: str) -> UserError:
    """The error for an optional package that is not installed; see :func:`require`."""
    name = PIP_NAMES.get(package, package)
    extra = next((extra for extra, packages in EXTRAS.items() if package in packages), None)
    if extra and IN_A_CLONE:
        how = f"pip install -e '.[{extra}]'"
    elif extra:
        how = f"pip install {' '.join(PIP_NAMES.get(one, one) for one in EXTRAS[extra])}, which is the extra [{extra}]"
    else:
        how = f"pip install {name}"
    return UserError(f"{purpose} needs {name}, which is not installed: {how}")


def require(module: str, purpose: str) -> ModuleType:
    """Import a module of an optional package.

    Args:
        module: its full name, such as "sklearn.datasets".
        purpose: what needs it, to begin the message with: "reading a video".

    Raises:
        UserError: the package is not installed; the message has the command that installs it.
    """
    package = module.partition(".")[0]
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != package:  # it is installed, but a package that it needs is not
            raise
        raise missing(package, purpose) from None


def check_installed(*packages: str, purpose: str) -> None:
    """Raise the error of :func:`require` if a package is not installed, without importing any.

    For the top of a module. If nothing catches the error there, Python prints its line alone, without a traceback.
    """
    for package in packages:
        if find_spec(package) is None:
            sys.excepthook = partial(_print_error, sys.excepthook)
            raise missing(package, purpose)


def _print_error(
    otherwise: Callable[[type[BaseException], BaseException, TracebackType | None], object],
    kind: type[BaseException],
    error: BaseException,
    traceback: TracebackType | None,
) -> None:
    if isinstance(error, UserError):
        sys.stderr.write(f"error: {error}\n")
    else:
        otherwise(kind, error, traceback)


class Stopped(BaseException):
    """A signal that ends a tool: its number."""


def run(main: Callable[[], None]) -> None:
    """Run a tool's `main`; every way in which it can fail is a line on standard error and an exit status.

    A UserError and an OSError end with status 2, a signal with 128 and its number, a closed output as SIGPIPE would.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name that the terminal's encoding lacks
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:  # nohup ignores SIGHUP
            signal.signal(number, _stop)
    status = _status_of(main)
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python tries again, and complains
        status = status or _failed(error)
    if status:
        sys.exit(status)


def _status_of(main: Callable[[], None]) -> int:
    try:
        main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except UserError as error:
        return _end(2, f"error: {error}")
    except OSError as error:  # a file it cannot read or write, a full disk
        return _failed(error)
    except KeyboardInterrupt as error:
        return _end(130, ": ".join(["interrupted", *map(str, error.args)]))
    except Stopped as stopped:
        number = signal.Signals(stopped.args[0])
        return _end(128 + number, f"stopped by {number.name}")
    return 0


def _failed(error: OSError) -> int:
    if isinstance(error, BrokenPipeError):  # nobody reads the output any more, as after `| head -1`
        return 128 + signal.SIGPIPE
    name = error.filename or "input or output"
    return _end(2, f"error: {one_line(f'{name}: {error.strerror or error}')}")


def _end(status: int, line: str) -> int:
    with suppress(OSError):  # the terminal is gone
        sys.stderr.write(f"{line}\n")
    return status


def _stop(number: int, frame: FrameType | None) -> None:
    raise Stopped(number)
