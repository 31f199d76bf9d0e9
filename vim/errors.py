"""What is told to a person who made a mistake, instead of a traceback."""

import sys
from collections.abc import Callable


class UserError(ValueError):
    """A mistake in what the user gave: what was expected, what came, and what to do, in one line."""

    def __init__(self, message: str) -> None:
        # a data loader's worker hands an exception on with its traceback before the message
        super().__init__(one_line(message.rsplit(f"{type(self).__name__}: ", 1)[-1]))


def one_line(message: str) -> str:
    """The lines of a message, joined; the list of names that torch may append, cut."""
    line = " ".join(part.strip() for part in message.strip().splitlines())
    return line if len(line) <= 500 else f"{line[:500]}..."


def describe(error: Exception) -> str:
    """What an exception of a library says, or its name where it says nothing."""
    return f"{type(error).__name__}: {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__


def run(main: Callable[[], None]) -> None:
    """Run a tool; a user's mistake, or a file out of reach, becomes a line on standard error and exit status 2."""
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
