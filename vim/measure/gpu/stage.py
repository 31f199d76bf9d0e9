"""What a stage has at hand: its shapes, its time, its clock, and the file of its rows."""

import gc
import json
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from vim.errors import one_line
from vim.measure.gpu import card
from vim.measure.gpu.shapes import REAL, TOY

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T")


@dataclass(frozen=True)
class Failure:
    """A case without a result, and why."""

    case: str
    error: str


def append(file: Path, row: "DataclassInstance") -> None:
    """Append a row to a file of JSON lines. Processes may share the file: a line is written in one piece."""
    with file.open("a") as lines:
        lines.write(json.dumps({"kind": type(row).__name__, **asdict(row)}) + "\n")


def read(file: Path, kind: type[T]) -> list[T]:
    """Return the rows of one kind. A file that does not exist has none."""
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [kind(**{key: row[key] for key in row if key != "kind"}) for row in rows if row["kind"] == kind.__name__]


class Stage:
    """One stage in this process.

    Args:
        name: the stage; its rows go to NAME.jsonl.
        end: the reading of `time.monotonic` after which no case is started.
        rehearse: run toy shapes, each timed by a single call.
        warm: run the cases only so that their kernels are compiled; write nothing.
        part, parts: run the cases part, part + parts, ... only.
    """

    def __init__(
        self,
        name: str,
        out: Path,
        *,
        end: float,
        rehearse: bool = False,
        warm: bool = False,
        part: int = 0,
        parts: int = 1,
    ) -> None:
        self.file = out / f"{name}.jsonl"
        self.end = end
        self.rehearse, self.warm = rehearse, warm
        self.own = slice(part, None, parts)
        self.shapes = TOY if rehearse else REAL
        self.clock: card.Clock = card.once if rehearse or warm else card.median

    def left(self) -> float:
        """Seconds until the end of the stage."""
        return self.end - time.monotonic()

    def write(self, row: "DataclassInstance") -> None:
        """Append a row to the stage's file."""
        if not self.warm:
            append(self.file, row)

    def each(self, cases: Mapping[str, Callable[[], "DataclassInstance"]], *, shared: bool = True) -> None:
        """Run this process's part of the cases and write the row of each. A failure leaves a :class:`Failure`.

        Cases that are not shared are all the first process's.
        """
        own = list(cases.items())[self.own] if shared else list(cases.items()) if self.own.start == 0 else []
        for number, (name, case) in enumerate(own):
            if self.left() <= 0:
                self.write(Failure(f"{len(own) - number} cases from {name} on", "not reached in the stage's time"))
                return
            try:
                self.write(case())
            except Exception as error:  # the next case must not depend on this one
                traceback.print_exc(file=sys.stderr)
                self.write(Failure(name, one_line(f"{type(error).__name__}: {error}")))
                gc.collect()  # the traceback held the case's tensors
            card.release()
