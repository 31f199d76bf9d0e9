"""Errors that a user sees as one line instead of a traceback."""

import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType, TracebackType

# the packages that each extra of setup.cfg brings, by the names that Python imports
EXTRAS = {
    "train": ("accelerate", "matplotlib", "mmengine", "rich", "sklearn"),
    "video": ("av", "decord"),
    "series": ("pandas", "statsmodels", "vega_datasets"),
    "export": ("onnx", "onnxruntime", "onnxscript"),
    "demo": ("mlxtend",),
    "streams": ("datasets", "webdataset"),
}
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


def describe(error: Exception) -> str:
    """The message of a library's exception, or the exception's name where it has no message."""
    return f"{type(error).__name__}: {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__


def missing(package: str, purpose: str) -> UserError:
    """The error for an optional package that is not installed; see :func:`require`."""
    name = PIP_NAMES.get(package, package)
    extra = next((extra for extra, packages in EXTRAS.items() if package in packages), None)
    command = f"pip install 'vim-zoo[{extra}]'" if extra else f"pip install {name}"
    return UserError(f"{purpose} needs {name}, which is not installed: {command}")


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


def run(main: Callable[[], None]) -> None:
    """Run a tool's `main`; a UserError or an OSError becomes a line on standard error and exit status 2."""
    try:
        main()
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    except OSError as error:  # a file it cannot read or write, a full disk
        sys.stderr.write(f"error: {error.filename or 'input or output'}: {error.strerror or one_line(str(error))}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)
