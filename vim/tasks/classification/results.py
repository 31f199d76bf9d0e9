"""Results of evaluations as tables and pictures."""

import csv
import math
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import TextIO

from vim.data import input_options
from vim.engine.config import add_config_arguments, work_dir_of
from vim.engine.files import appending, make_folder, write_csv, write_text
from vim.engine.plots import plot_confusion, save_figure
from vim.errors import UserError
from vim.options import ImageData
from vim.tasks.classification.candidates import Candidate, load_candidate
from vim.tasks.classification.evaluate import Evaluation
from vim.typing import VisionModel


@dataclass
class Result:
    """A row of the table of results. The fields are its columns.

    Attributes:
        date: local, with its offset.
        views: frames x crops x clips of a video; empty for images.
        img_size: height x width in pixels, or one number if they are equal.
        top1, top5: accuracies, as fractions.
    """

    date: str
    checkpoint: str
    config: str
    weights: str
    labels: str
    views: str
    img_size: str
    images: int
    unreadable: int
    loss: float
    top1: float
    top5: float
    seconds: float

    @classmethod
    def of(cls, evaluation: Evaluation, *, seconds: float, **about: str) -> "Result":
        """Return the row of an evaluation that has just ended; `about` has the columns without figures."""
        return cls(
            date=datetime.now().astimezone().isoformat(timespec="seconds"),
            images=evaluation.images,
            unreadable=len(evaluation.unreadable),
            loss=evaluation.loss,
            top1=evaluation.top1,
            top5=evaluation.top5,
            seconds=round(seconds, 2),
            **{"views": "", **about},
        )


COLUMNS = [field.name for field in fields(Result)]


def image_size(model: VisionModel, data: ImageData) -> str:
    """Return the size that images are prepared in, such as "224", or "224x192", height first."""
    height, width = {**input_options(model), **data.eval_transform}["input_size"][-2:]
    return str(height) if height == width else f"{height}x{width}"


def open_results(path: Path) -> None:
    """Begin a table of results, or check that the file that exists can be appended to.

    Raises:
        UserError: the file has other columns, or ends within a line.
    """
    make_folder(path.parent)
    with appending(path) as file:
        file.seek(0)
        text = file.read()
        if not text:
            csv.writer(file).writerow(COLUMNS)
            return
    found = text.splitlines()[0]
    if found != ",".join(COLUMNS):
        raise UserError(
            f"{path} has other columns: expected {','.join(COLUMNS)}, found {found[:100]}; name another --csv"
        )
    if not text.endswith("\n"):
        raise UserError(f"{path} ends within a line: complete it or take it out, or name another --csv")


def append_result(table: TextIO, result: Result) -> None:
    """Append a row to a table that :func:`open_results` has checked."""
    csv.DictWriter(table, COLUMNS).writerow(asdict(result))


def write_evaluation(folder: Path, tag: str, evaluation: Evaluation, classes: Sequence[str]) -> list[str]:
    """Write the confusion matrix, the accuracy of each class, and the unreadable images. Return the files' names.

    The accuracy of a class without images is left empty.
    """
    names = [f"confusion_{tag}.png", f"classes_{tag}.csv"]
    plot_confusion(folder / names[0], evaluation.confusion, classes)
    counts, right = evaluation.confusion.sum(1).tolist(), evaluation.confusion.diag().tolist()
    rows = zip(classes, counts, right, strict=True)
    write_csv(folder / names[1], [{"class": c, "count": n, "top1": r / n if n else ""} for c, n, r in rows])
    unreadable = folder / f"unreadable_{tag}.txt"
    unreadable.unlink(missing_ok=True)  # of an earlier evaluation
    if evaluation.unreadable:
        write_text(unreadable, "".join(f"{line}\n" for line in evaluation.unreadable))
        names.append(unreadable.name)
    return names


class Report:
    """The results of one command: rows of a table, and files.

    Args:
        arguments: with `config`, `checkpoint`, `csv` and `work_dir`.
        writes: whether this process writes.

    Raises:
        UserError: the table of results cannot be appended to.
    """

    def __init__(self, arguments: Namespace, candidate: Candidate, *, writes: bool) -> None:
        self.arguments, self.candidate, self.writes = arguments, candidate, writes
        self.folder = work_dir_of(arguments)
        self.table = arguments.csv or self.folder / "results.csv"
        self.results: list[Result] = []
        if writes:
            make_folder(self.folder)
            open_results(self.table)

    def add(self, evaluation: Evaluation, classes: Sequence[str], tag: str, seconds: float, **about: str) -> list[str]:
        """Write the figures of an evaluation, and return them in lines, the accuracy last.

        Args:
            tag: a part of the names of files.
            about: other columns of :class:`Result`.

        Raises:
            UserError: the figures are not finite.
        """
        if not self.writes:
            return []
        paths = {"checkpoint": str(self.arguments.checkpoint), "config": str(self.arguments.config)}
        result = Result.of(evaluation, seconds=seconds, **paths, weights=self.candidate.weights, **about)
        if not math.isfinite(result.loss):
            raise UserError(
                f"the loss is {result.loss}: outputs of {self.arguments.checkpoint} are not finite, its accuracy means "
                "nothing; --amp no computes in float32"
            )
        self.results.append(result)
        with appending(self.table) as table:  # another process that reports there waits
            append_result(table, result)
            names = write_evaluation(self.folder, tag, evaluation, classes)
        kind = "videos" if result.views else "images"
        unreadable = f", {result.unreadable} more cannot be read" if result.unreadable else ""
        views = f" ({result.views} frames x crops x clips)" if result.views else ""
        return [
            f"{result.img_size} pixels, {result.images} {kind}{unreadable}; in {self.folder}: {', '.join(names)}",
            f"loss {result.loss:.4f}, top-5 {100 * result.top5:.2f} %",
            f"top-1 {100 * result.top1:.2f} %{views}",
        ]


def add_evaluation_arguments(parser: ArgumentParser) -> None:
    """Add the arguments that the tools which evaluate share."""
    add_config_arguments(parser)
    parser.add_argument("checkpoint", type=Path, help="best.pth or last.pth of a run; with --model, published weights")
    parser.add_argument("--model", metavar="NAME", help="the model that published weights are for, such as vim_small")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--raw", action="store_true", help="the weights as trained, of a run that kept their average")
    kinds.add_argument("--ema", action="store_true", help="their running average (the default where a run kept it)")
    parser.add_argument(
        "--csv", type=Path, metavar="FILE", help="append the figures there (default: results.csv of the work dir)"
    )


def candidate_of(arguments: Namespace) -> Candidate:
    """Return the model that the arguments of :func:`add_evaluation_arguments` name."""
    weights = "raw" if arguments.raw else "ema" if arguments.ema else None
    return load_candidate(arguments.checkpoint, name=arguments.model, weights=weights)


def plot_sizes(path: Path, results: Sequence[Result]) -> None:
    """Draw the accuracies over the sizes of the images."""
    import matplotlib.pyplot as plt

    results = sorted(results, key=lambda result: int(result.img_size))
    sizes = [int(result.img_size) for result in results]
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    axes.plot(sizes, [100 * result.top1 for result in results], "o-", label="top-1")
    axes.plot(sizes, [100 * result.top5 for result in results], "o-", label="top-5")
    axes.set(xlabel="height and width of the images, pixels", ylabel="accuracy, %", xticks=sizes)
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path)
