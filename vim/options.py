"""Every option of a run, in one place: name, type, range, default and help.

:func:`read` checks a section of a config and returns it as one of these dataclasses. The option tables in docs/ and the
output of `--help-options` are made from the same fields.
"""

import math
from collections.abc import Mapping
from copy import copy
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from types import UnionType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar, get_args, get_origin

from vim.errors import UserError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Section = dict[str, Any]  # keyword arguments of a function, mostly of timm's
T = TypeVar("T")
D = TypeVar("D", bound="DataclassInstance")


class Option(NamedTuple):
    """The metadata of a field: help, and for a number the range."""

    help: str
    at_least: float = -math.inf
    above: float = -math.inf
    below: float = math.inf


def option(default: T, help: str, **limits: float) -> T:
    """A field that a config may leave out, or set to None, for its default; `limits` are those of :class:`Option`."""
    return field(default_factory=lambda: copy(default), metadata={"option": Option(help, **limits)})


def required(help: str, **limits: float) -> Any:
    """A field that a config must set."""
    return field(metadata={"option": Option(help, **limits)})


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """How a run trains, whatever the task: a config's `train` section."""

    seed: int = option(0, "seed of every random choice", at_least=0)
    amp: Literal["no", "bf16", "fp16"] = option("no", "precision of matrix products; `fp16` needs a GPU")
    clip_grad: float | None = option(None, "largest norm of the gradients of an update", above=0)
    ema_decay: float | None = option(
        None, "decay of a running average of the weights, which is then evaluated and saved", at_least=0, below=1
    )
    accumulate: int = option(1, "batches per update", at_least=1)
    grad_checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, more time")
    compile: bool = option(False, "compile the model with `torch.compile`")
    patience: int | None = option(None, "stop after so many epochs without a better evaluation", at_least=1)
    save_updates: int | None = option(None, "save after every so many updates too, not only after an epoch", at_least=1)
    keep: int = option(1, "how many saves to keep: `last.pth`, `last.1.pth`, ...", at_least=1)
    max_skipped: int = option(
        10, "stop after so many consecutive updates whose loss or gradient is not finite", at_least=1
    )
    trackers: tuple[str, ...] = option((), "log to these as well: `tensorboard`, `wandb`")


@dataclass(frozen=True, kw_only=True)
class ImageTrainOptions(TrainOptions):
    """How a run on images or videos trains."""

    smoothing: float = option(0.0, "label smoothing", at_least=0, below=1)


@dataclass(frozen=True, kw_only=True)
class ImageData:
    """Images or videos to train and evaluate on: a config's `data` section."""

    dataset: str = required("name of the data set, such as `folder` or `videos`")
    root: str | None = option(None, "folder of the data set")
    video: Section = option({}, "how clips are read (docs/video.md)")
    train_options: Section = option(
        {}, "for the training part: changes of `video`, or options of `timm.data.create_dataset`"
    )
    val_options: Section = option({}, "the same for the validation part")
    batch_size: int = required("images or videos per batch, in each process", at_least=1)
    num_workers: int = required("processes that load data, for each process that trains", at_least=0)
    repeats: int = option(
        1, "repeated augmentation: each image comes so many times, in an epoch of unchanged length", at_least=1
    )
    samples: int = option(1, "each image or video comes so many times, in an epoch so many times as long", at_least=1)
    max_unreadable: float = option(
        0.01, "stop when more than this fraction of the images cannot be read", at_least=0, below=1
    )
    train_transform: Section = option({}, "options of `timm.data.create_transform` for training")
    eval_transform: Section = option({}, "options of `timm.data.create_transform` for evaluation")


@dataclass(frozen=True, kw_only=True)
class SeriesData:
    """A time series to train and evaluate on: a config's `data` section.

    Raises:
        UserError: `season` is longer than `lookback`.
    """

    dataset: str = required("`csv`, `vic_elec`, `seattle_temps` or `lorenz`")
    file: str | None = option(None, "the CSV file of the data set `csv`")
    split: Literal["ratio", "etth", "ettm"] = option("ratio", "which rows train, validate and test")
    lookback: int = required("rows the model sees", at_least=1)
    horizon: int = required("rows the model forecasts", at_least=1)
    max_gap: int = option(6, "most consecutive missing values that are filled with the value before them", at_least=0)
    calendar: bool = option(False, "give the model the calendar of the rows to forecast")
    season: int | None = option(None, "rows per season; adds the simple forecast `last season`", at_least=1)
    known: tuple[str, ...] = option((), "columns whose future values are known")
    static: str | None = option(None, "CSV file of covariates that do not change over time")
    batch_size: int = required("windows per batch", at_least=1)

    def __post_init__(self) -> None:
        if self.season is not None and self.season > self.lookback:
            raise UserError(f"data.season must be at most data.lookback, {self.lookback}, got {self.season}")


@dataclass(frozen=True, kw_only=True)
class OptimizerKeys:
    """The options of a config's `optimizer` section that are checked here; see :data:`CHECKED`."""

    weight_decay: float = option(0.0, "weight decay", at_least=0)


@dataclass(frozen=True, kw_only=True)
class ScheduleKeys:
    """The options of a config's `schedule` section that are checked here; see :data:`CHECKED`."""

    # without timm's "plateau": its rate follows from past evaluations, so a run could not be resumed exactly
    sched: Literal["cosine", "multistep", "poly", "step", "tanh"] = option("cosine", "how the learning rate falls")
    num_epochs: int = required("epochs of the run", at_least=1)
    warmup_epochs: int = option(0, "epochs of linear warm-up", at_least=0)


# sections that go to timm, which checks their other options
CHECKED: dict[str, type["DataclassInstance"]] = {"optimizer": OptimizerKeys, "schedule": ScheduleKeys}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A run as a config describes it: a field per section."""

    model: Section
    data: ImageData | SeriesData
    optimizer: Section
    schedule: Section
    train: TrainOptions


@dataclass(frozen=True, kw_only=True)
class ImageRecipe(Recipe):
    """A run on images or videos; None stands for no mixing, no teacher and no masked pre-training."""

    data: ImageData
    train: ImageTrainOptions
    mixup: Section | None = None
    teacher: Section | None = None
    masking: Section | None = None


@dataclass(frozen=True, kw_only=True)
class SeriesRecipe(Recipe):
    """A run on time series."""

    data: SeriesData


def read(kind: type[D], section: str, values: Mapping[str, object], source: str) -> D:
    """Check a section of a config and return it as the dataclass `kind`.

    Args:
        section: the section's name, for error messages.
        values: the options by name; None stands for an option's default.
        source: what the section was read from, for error messages: "the config a.py".

    Raises:
        UserError: an option is unknown, missing, of the wrong type or out of range.
    """
    names = [one.name for one in fields(kind)]
    for name in values:
        if name not in names:
            raise UserError(f"{section} has no option {name} in {source}, only {', '.join(names)}")
    return kind(**check(kind, section, values, source))


def check(kind: type["DataclassInstance"], section: str, values: Mapping[str, object], source: str) -> Section:
    """Return the values that are options of `kind`, without those that are None.

    Raises:
        UserError: an option is missing, of the wrong type or out of range.
    """
    checked: Section = {}
    for one in fields(kind):
        value = values.get(one.name)
        if value is None and one.default_factory is not MISSING:
            continue
        if not _fits(one, value):
            quotes = " (put a number in quotes)" if _type(one) is str and isinstance(value, int | float) else ""
            raise UserError(f"{section}.{one.name} must be {describe(one)} in {source}, got {value!r}{quotes}")
        checked[one.name] = tuple(value) if isinstance(value, list) else value
    return checked


def describe(one: "Field[object]") -> str:
    """The values that an option takes, in words: "a whole number >= 1"."""
    kind, limits = _type(one), one.metadata["option"]
    if choices := _choices(one):
        *names, last = map(repr, choices)
        return f"{', '.join(names)} or {last}"
    words = {int: "a whole number", float: "a number", bool: "True or False", tuple: "a list of names"}
    words |= {str: "a string", dict: "a dict"}
    bounds = {">=": limits.at_least, ">": limits.above, "<": limits.below}
    bounded = " and".join(f" {sign} {bound:g}" for sign, bound in bounds.items() if math.isfinite(bound))
    return f"{'None or ' if isinstance(one.type, UnionType) else ''}{words[kind]}{bounded}"


def markdown_table(kind: type["DataclassInstance"]) -> str:
    """The options of a section as a table for docs/."""
    lines = ["| option | value | default | |", "|---|---|---|---|"]
    for one in fields(kind):
        lines.append(f"| `{one.name}` | {describe(one)} | {_default(one)} | {one.metadata['option'].help} |")
    return "\n".join(lines)


def help_text(kind: type[Recipe]) -> str:
    """The options of a config's sections as text for a terminal, two lines each."""
    lines = []
    for section in fields(kind):
        options = CHECKED.get(section.name, section.type)
        for one in fields(options) if is_dataclass(options) else ():
            lines += [f"{section.name}.{one.name}: {describe(one)}; default: {_default(one)}"]
            lines += [f"    {one.metadata['option'].help}"]
    return "\n".join([*lines, "Other options of optimizer and schedule, and those of model, go to timm.", ""])


def _default(one: "Field[object]") -> str:
    if one.default_factory is MISSING:
        return "required"
    default = one.default_factory()
    return repr([] if default == () else default)


def _choices(one: "Field[object]") -> tuple[str, ...]:
    return get_args(one.type) if get_origin(one.type) is Literal else ()


def _type(one: "Field[object]") -> type:
    """The option's type without its parameters and without None."""
    hint: Any = get_args(one.type)[0] if isinstance(one.type, UnionType) else one.type
    return get_origin(hint) or hint


def _fits(one: "Field[object]", value: object) -> bool:
    kind, limits = _type(one), one.metadata["option"]
    if choices := _choices(one):
        return value in choices
    if kind is tuple:
        return isinstance(value, list | tuple) and all(isinstance(part, str) for part in value)
    if kind not in (int, float):
        return isinstance(value, kind)
    if isinstance(value, bool) or not isinstance(value, int if kind is int else int | float):
        return False
    return value >= limits.at_least and value > limits.above and value < limits.below
