"""Whether what a save holds fits the run that is to be resumed from it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vim.errors import UserError

Facts = Mapping[str, object]


@dataclass
class Position:
    """Where a run is: the epoch, the updates done in it, and the sum of their losses."""

    epoch: int = 0
    update: int = 0
    losses: float = 0.0
    aux: float = 0.0  # what of the sum balances a model's experts
    counted: int = 0  # updates that were not skipped
    skipped: int = 0  # consecutive skipped updates up to now


def refuse_changes(before: Facts, now: Facts, message: str) -> None:
    """Refuse to go on with another function, or with other data.

    Args:
        message: with a place for the name of the fact that has changed.

    Raises:
        UserError: names the first fact that differs.
    """
    for name in {**before, **now}:
        known = name in before or name.startswith("model.")  # a save of an earlier version lacks some others
        if known and _plain(before.get(name)) != _plain(now.get(name)):
            values = f"it was {_short(before.get(name))}, and is now {_short(now.get(name))}"
            raise UserError(f"{message.format(name)}: {values}; resume with the same")


def _plain(value: object) -> object:
    """Return the value; a list, which --cfg-options makes, as a tuple."""
    return tuple(value) if isinstance(value, list) else value


def check_names(found: Facts, wanted: Facts, what: str, path: Path) -> None:
    """Check that a save has the entries that the run needs, and no others.

    Raises:
        UserError: it does not.
    """
    if found.keys() != wanted.keys():
        raise UserError(f"{path} cannot be resumed: {what} has the entries {_list(found)}, and the run {_list(wanted)}")


def check_rows(
    rows: Sequence[Mapping[str, float]],
    position: Mapping[str, Any],
    path: Path,
    *,
    score: Callable[[Mapping[str, float]], float],
    updates: int,
) -> None:
    """Check the log of a save, a row an epoch, against its position.

    Args:
        score: how good the figures of a row are; see :class:`vim.engine.loop.Task`.
        updates: of an epoch.

    Raises:
        UserError: they do not fit one another.
    """
    for number, row in enumerate(rows, 1):
        if row.keys() != rows[0].keys() or not {"epoch", "lr", "train_loss"} <= row.keys() or row["epoch"] != number:
            raise UserError(f"{path} is no sound checkpoint: row {number} of its log is not of epoch {number}")
    try:
        for row in rows:
            score(row)
    except KeyError as error:
        raise UserError(f"{path} cannot be resumed: its log lacks {error}") from None
    if position["epoch"] != len(rows):
        raise UserError(
            f"{path} is no sound checkpoint: it is at epoch {position['epoch']}, and its log has {len(rows)} rows"
        )
    if not position["counted"] <= position["update"] <= updates:
        raise UserError(
            f"{path} is no sound checkpoint: it is at update {position['update']} with {position['counted']} losses, "
            f"in an epoch of {updates} updates"
        )


def check_optimizer(found: Mapping[str, Any], fresh: Mapping[str, Any], path: Path) -> None:
    """Check the state of an optimizer against the one that the run begins with.

    Args:
        found, fresh: see :class:`vim.engine.schema.Optimizer`.

    Raises:
        UserError: they are of other optimizers, or a part of the state is missing, of another shape or not finite.
    """
    for group in found["param_groups"]:
        names = group.get("params", [])
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise UserError(f"{path} is no sound checkpoint: the optimizer's params must be names, in a list")
    groups = [[(set(group), group.get("params")) for group in one["param_groups"]] for one in (found, fresh)]
    if groups[0] != groups[1]:
        raise UserError(
            f"{path} was trained with another optimizer: resume with the same optimizer.opt and weight_decay"
        )
    for group, wanted in zip(found["param_groups"], fresh["param_groups"], strict=True):
        for key in wanted.keys() - {"params"}:
            if not _alike(group[key], wanted[key]):
                raise UserError(
                    f"{path} cannot be resumed: the optimizer's {key} must be {_kind(wanted[key])}, finite, "
                    f"got {_kind(group[key])}"
                )
    check_names(found["state"], fresh["state"], "the optimizer's state", path)
    for name, wanted in fresh["state"].items():
        check_names(found["state"][name], wanted, f"the optimizer's state of {name}", path)
        for key, value in wanted.items():
            if not _alike(found["state"][name][key], value):
                raise UserError(
                    f"{path} cannot be resumed: the optimizer's {key} of {name} must be {_kind(value)}, finite, "
                    f"got {_kind(found['state'][name][key])}"
                )
            if key in ("step", "exp_avg_sq") and bool(torch.as_tensor(found["state"][name][key]).lt(0).any()):
                raise UserError(f"{path} cannot be resumed: the optimizer's {key} of {name} is negative")


def _alike(found: Any, fresh: Any) -> bool:
    """Return whether a value can take another's place: of the same type, shape and precision, and finite."""
    if isinstance(fresh, Tensor):
        same = isinstance(found, Tensor) and (found.shape, found.dtype) == (fresh.shape, fresh.dtype)
        return same and _is_whole(found) and bool(found.isfinite().all())
    if isinstance(fresh, list | tuple):
        return isinstance(found, list | tuple) and len(found) == len(fresh) and all(map(_alike, found, fresh))
    return isinstance(found, type(fresh)) or (isinstance(found, int | float) and isinstance(fresh, int | float))


def _is_whole(tensor: Tensor) -> bool:
    """Return whether each number of a tensor has memory of its own."""
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _kind(value: object) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _list(entries: Facts) -> str:
    names = sorted(entries)
    return (", ".join(names[:5]) or "none") + (", ..." if len(names) > 5 else "")


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 100 else f"{text[:100]}..."
