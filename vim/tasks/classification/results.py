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
from vim.tasks.classification.evaluate import FIGURES, AnyEvaluation, Evaluation
from vim.tasks.classification.multilabel import FIGURES as MULTILABEL_FIGURES
from vim.typing import VisionModel

DRAWN = {"top1": "top-1 accuracy", "top5": "top-5 accuracy", "map": "mean average precision"}


@dataclass
class Result:
    """A row of the table of results.

    Attributes:
        date: local, with its offset.
        views: frames x crops x clips of a video; empty for images.
        img_size: height x width in pixels, or one number if they are equal.
        figures: of the evaluation; each has a column, see :func:`columns`.
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
    figures: dict[str, float]
    seconds: float

    @classmethod
    def of(cls, evaluation: AnyEvaluation, *, seconds: float, **about: str) -> "Result":
        """Return the row of an evaluation that has just ended; `about` has the columns without figures."""
        return cls(
            date=datetime.now().astimezone().isoformat(timespec="seconds"),
            images=evaluation.images,
            unreadable=len(evaluation.unreadable),
            figures=evaluation.figures,
            seconds=round(seconds, 2),
            **{"views": "", **about},
        )


def columns(*, several: bool = False) -> list[str]:
    """Return the columns of the table of results; `several`: of images with any number of labels."""
    names = [field.name for field in fields(Result)]
    place = names.index("figures")
    return [*names[:place], *(MULTILABEL_FIGURES if several else FIGURES), *names[place + 1 :]]


def image_size(model: VisionModel, data: ImageData) -> str:
    """Return the size that images are prepared in, such as "224", or "224x192", height first."""
    height, width = {**input_options(model), **data.eval_transform}["input_size"][-2:]
    return str(height) if height == width else f"{height}x{width}"


def open_results(path: Path, columns: Sequence[str]) -> None:
    """Begin a table of results, or check that the file that exists can be appended to.

    Args:
        columns: of :func:`columns`.

    Raises:
        UserError: the file has other columns, or ends within a line.
    """
    make_folder(path.parent)
    with appending(path) as file:
        file.seek(0)
        text = file.read()
        if not text:
            csv.writer(file).writerow(columns)
            return
    found = text.splitlines()[0]
    if found != ",".join(columns):
        raise UserError(
            f"{path} has other columns: expected {','.join(columns)}, found {found[:100]}; name another --csv"
        )
    if not text.endswith("\n"):
        raise UserError(f"{path} ends within a line: complete it or take it out, or name another --csv")


def append_result(table: TextIO, result: Result) -> None:
    """Append a row to a table that :func:`open_results` has checked."""
    row = asdict(result)
    row |= row.pop("figures")
    csv.DictWriter(table, columns(several="map" in row)).writerow(row)


def write_evaluation(folder: Path, tag: str, evaluation: AnyEvaluation, classes: Sequence[str]) -> list[str]:
    """Write the figures of each class, the confusion matrix if an image has one, and the unreadable images.

    A figure of a class without images is left empty.

    Returns:
        The files' names.
    """
    names = [f"classes_{tag}.csv"]
    write_csv(folder / names[0], class_rows(evaluation, classes))
    if isinstance(evaluation, Evaluation):
        names.insert(0, f"confusion_{tag}.png")
        plot_confusion(folder / names[0], evaluation.confusion, classes)
    unreadable = folder / f"unreadable_{tag}.txt"
    unreadable.unlink(missing_ok=True)  # of an earlier evaluation
    if evaluation.unreadable:
        write_text(unreadable, "".join(f"{line}\n" for line in evaluation.unreadable))
        names.append(unreadable.name)
    return names


def class_rows(evaluation: AnyEvaluation, classes: Sequence[str]) -> list[dict[str, object]]:
    """Return a row for each class: how many images have it, and how well it is predicted."""
    if isinstance(evaluation, Evaluation):
        images = evaluation.confusion.sum(1)
        figures = {"top1": evaluation.confusion.diag().double() / images}
    else:
        counts = evaluation.at_thresholds
        images = counts.actual.long()
        figures = {
            "ap": evaluation.average_precision,
            "threshold": evaluation.thresholds,
            "precision": counts.precision(),
            "recall": counts.recall(),
        }
    rows = []
    for i, (name, count) in enumerate(zip(classes, images.tolist(), strict=True)):
        rows.append(
            {"class": name, "count": count, **{key: v[i].item() if count else "" for key, v in figures.items()}}
        )
    return rows


class Report:
    """The results of one command: rows of a table, and files.

    Args:
        arguments: with `config`, `checkpoint`, `csv` and `work_dir`.
        several: whether an image may have several labels.
        writes: whether this process writes.

    Raises:
        UserError: the table of results cannot be appended to.
    """

    def __init__(self, arguments: Namespace, candidate: Candidate, *, several: bool = False, writes: bool) -> None:
        self.arguments, self.candidate, self.writes = arguments, candidate, writes
        self.folder = work_dir_of(arguments)
        self.table = arguments.csv or self.folder / "results.csv"
        self.results: list[Result] = []
        if writes:
            make_folder(self.folder)
            open_results(self.table, columns(several=several))

    def add(
        self, evaluation: AnyEvaluation, classes: Sequence[str], tag: str, seconds: float, **about: str
    ) -> list[str]:
        """Write the figures of an evaluation, and return them in lines, the most important one last.

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
        if not math.isfinite(evaluation.loss):
            raise UserError(
                f"the loss is {evaluation.loss}: outputs of {self.arguments.checkpoint} are not finite, its accuracy "
                "means nothing; --amp no computes in float32"
            )
        self.results.append(result)
        with appending(self.table) as table:  # another process that reports there waits
            append_result(table, result)
            names = write_evaluation(self.folder, tag, evaluation, classes)
        kind = "videos" if result.views else "images"
        unreadable = f", {result.unreadable} more cannot be read" if result.unreadable else ""
        views = f" ({result.views} frames x crops x clips)" if result.views else ""
        *lines, last = evaluation.summary
        return [
            f"{result.img_size} pixels, {result.images} {kind}{unreadable}; in {self.folder}: {', '.join(names)}",
            *lines,
            f"{last}{views}",
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
    """Draw the accuracies, or the mean average precision, over the sizes of the images."""
    import matplotlib.pyplot as plt

    results = sorted(results, key=lambda result: int(result.img_size))
    sizes = [int(result.img_size) for result in results]
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    shown = {name: label for name, label in DRAWN.items() if name in results[0].figures}
    for name, label in shown.items():
        axes.plot(sizes, [100 * result.figures[name] for result in results], "o-", label=label)
    axes.set(xlabel="height and width of the images, pixels", ylabel="%", xticks=sizes)
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path)
