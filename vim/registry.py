"""Which models there are by name, and which of their options a checkpoint may hold."""

import inspect
import re
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

import timm
import torch
from timm.models import get_model_args
from torch import nn

import vim  # noqa: F401  registers the models
from vim.errors import UserError, closest, no_such

NOT_ARCHITECTURE = ("self", "device", "dtype")
# options of timm's models that are sizes; of others, some models make tables whose size is their fourth power
SIZES = {
    *("num_classes", "in_chans", "img_size", "patch_size", "embed_dim", "embed_dims", "dims", "channels"),
    *("num_features", "depth", "depths", "layers", "num_heads", "head_dim", "head_hidden_size", "stem_width"),
    *("base_width", "num_frames"),
}
MOST = {True: 100_000, False: 32}  # of a size, of another whole number
WEIGHTS_FROM = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir")
MOST_ITEMS = 64  # of an option that is a list


def own_models() -> list[str]:
    """List the models of this package."""
    return [name for name in timm.list_models() if is_own(name)]


def is_own(name: str) -> bool:
    """Return whether a registered name is of a model of this package."""
    return timm.model_entrypoint(name).__module__.startswith("vim.models.")


def check_name(name: str) -> None:
    """Check that timm knows a model by a name, which may end in a tag.

    Raises:
        UserError: it does not; the message has the closest names.
    """
    if not re.fullmatch(r"[\w.]+", name, re.ASCII) or not timm.is_model(name):
        own, base = own_models(), name.partition(".")[0]
        names = own if get_close_matches(base, own) else timm.list_models()
        raise UserError(f"no such model: {name} {closest(base, names)}")


def create(model_name: str, **options: Any) -> nn.Module:
    """Return the model that timm makes by a name: a registered one, `local-dir:FOLDER` or `hf-hub:REPOSITORY`.

    Raises:
        UserError: there is no such model or folder.
        Exception: timm and the models raise many kinds for options that do not fit.
    """
    if model_name.startswith("local-dir:"):
        config = Path(model_name.removeprefix("local-dir:"), "config.json")
        if not config.is_file():
            raise no_such("file", config)
    elif ":" not in model_name:
        check_name(model_name)
    return timm.create_model(model_name, **options)


def architecture(options: Mapping[str, object], model: nn.Module) -> dict[str, object]:
    """Return what a checkpoint keeps of a recipe's `model` section: a registered name, and options of the model.

    Raises:
        UserError: an option cannot be kept; see :func:`check_options`.
    """
    kept = {name: value for name, value in options.items() if name not in WEIGHTS_FROM and value is not None}
    if ":" in str(kept.get("model_name")):  # a folder's or a repository's config has named the model and its options
        facts = cast(Mapping[str, object], model.pretrained_cfg)
        kept = {"model_name": facts["architecture"], **get_model_args(model)}
    own = type(model).__module__.startswith("vim.models.")
    check_options(type(model), {name: value for name, value in kept.items() if name != "model_name"}, own=own)
    return kept


def check_options(kind: type[nn.Module], options: Mapping[str, object], *, own: bool) -> None:
    """Check options of a model that are to be kept in a checkpoint, or were read from one.

    These are arguments of the model's class, other than its place. None loads anything or names a file. The values are
    numbers, identifiers, or lists of them.

    Args:
        own: whether the class is of this package, and checks its options itself.

    Raises:
        UserError: an option is not of the class, or has another value.
    """
    parameters = inspect.signature(kind.__init__).parameters.items()
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    known = [name for name, one in parameters if one.kind in named and name not in NOT_ARCHITECTURE]
    for name, value in options.items():
        if name not in known:
            raise UserError(f"a checkpoint cannot hold the option {name} of a {kind.__name__} {closest(name, known)}")
        most = MOST[own or name in SIZES]
        if not _is_plain(value, most, lists=2):
            raise UserError(
                f"the option {name} of a {kind.__name__} must be an identifier, a finite number of at most {most}, or "
                f"a list of these to be held by a checkpoint"
            )


def _is_plain(value: object, most: int, lists: int) -> bool:
    if isinstance(value, list | tuple):
        return lists > 0 and len(value) <= MOST_ITEMS and all(_is_plain(part, most, lists - 1) for part in value)
    if isinstance(value, str):
        return re.fullmatch(r"[\w-]{0,64}", value, re.ASCII) is not None
    return value is None or isinstance(value, bool) or (isinstance(value, int | float) and abs(value) <= most)


def class_of(name: str) -> type[nn.Module]:
    """Return the class of a registered model."""
    with torch.device("meta"):
        return type(timm.create_model(name))
