"""Load published weights: a file is read without running anything in it, and every tensor is accounted for.

This file serves every family. What is peculiar to a family's published files stands beside its class, in
`rename_weights` and `adapt_weights`.
"""

import argparse
import logging
import pickletools
import re
import zipfile
from collections import Counter, OrderedDict, deque
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Protocol, TypedDict, runtime_checkable

import safetensors.torch
import torch
from huggingface_hub import hf_hub_url
from timm.layers import to_2tuple
from timm.models import adapt_input_conv
from torch import Tensor, nn

from vim.errors import UserError, describe, no_such

# where trainers keep the state dict: timm, torchvision, Lightning, DeepSpeed, the PyTorch tutorials and others
WRAPPERS = ("model", "module", "state_dict", "model_state_dict", "model_state", "net", "network", "weights", "params")
EMA_WRAPPERS = ("model_ema", "state_dict_ema", "ema_state_dict", "ema_model", "ema", "params_ema")
PREFIXES = ("module.", "backbone.", "encoder.", "_orig_mod.", "model.", "net.", "network.", "timm_model.")
AVERAGED = ("n_averaged", "steps")  # counters beside the weights in the averages of torch and of mmengine
COUNTER = ".num_batches_tracked"  # of a batch norm; old and pruned files lack it
MOST_WRAPPERS = 8  # in one another; a dict can hold itself
HEAD = ("head.weight", "head.bias")
# of the calls that torch's own reader allows in a file, those that trainers write
HARMLESS = re.compile(
    r"argparse\.Namespace|yacs\.config\.CfgNode|collections\.(OrderedDict|Counter)|(builtins|__builtin__)\.(set|complex)"
    r"|torch\.(Size|device|\w+Storage|bool|u?int\d+|b?float\d+|complex\d+)"
    r"|torch\._utils\._rebuild_(tensor_v2|parameter)"
)
# what trainers, mmengine's above all, log beside the weights: numpy's values, and histories of them
UNREAD = {
    **{f"numpy.{core}.multiarray._reconstruct": "ndarray" for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": "numpy scalar" for core in ("core", "_core")},
    "numpy.ndarray": "class",
    "numpy.dtype": "dtype",
    "builtins.bytes": "bytes",  # of an empty array; others are encoded
    "builtins.getattr": "method",  # of a HistoryBuffer
    "mmengine.logging.history_buffer.HistoryBuffer": "HistoryBuffer",
}
ENCODE = ("GLOBAL", "_codecs encode")
LATIN1 = ("BINUNICODE", "latin1")
MOST = {  # opcodes, by a part of their names
    "": (500_000, "opcodes"),  # of which a tensor takes about thirty; to read more takes long
    "GLOBAL": (1_000, "names of functions"),  # torch looks each up slowly; a pickler writes each once
    "TUPLE": (100_000, "tuples"),  # a tensor takes about four; a million inside one another crash the interpreter
    "LONG1": (2_000, "long integers"),  # as keys of one hash, each is compared with all before it
}

_logger = logging.getLogger(__name__)


class _Unread:
    """What is read in place of a value that no weights need: it ignores its arguments and its state."""

    def __init__(self, *_: object) -> None: ...
    def __setstate__(self, _: object) -> None: ...


# the options of the training code, argparse's as they are and those of yacs as a dict; and what is left unread
READ_AS: list[Any] = [argparse.Namespace, (OrderedDict, "yacs.config.CfgNode")]
READ_AS += [(type(kind, (_Unread,), {}), name) for name, kind in UNREAD.items()]


class TagFacts(TypedDict, total=False):
    """The entries of timm's `pretrained_cfg` that loading reads."""

    file: str
    url: str
    hf_hub_id: str
    hf_hub_filename: str
    license: str
    source: str
    origin_url: str
    first_conv: str
    input_size: tuple[int, int, int]
    num_classes: int


@runtime_checkable
class Loadable(Protocol):
    """The attributes and methods that loading a checkpoint asks of a model; :class:`vim.layers.TimmModel` has them."""

    in_chans: int
    num_classes: int
    pretrained_cfg: TagFacts
    pretrained_model_args: dict[str, object]

    def state_dict(self) -> Mapping[str, Tensor]: ...
    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> object: ...
    def reset_classifier(self, num_classes: int) -> None: ...
    def rename_weights(self, weights: dict[str, object]) -> dict[str, object]: ...
    def adapt_weights(self, weights: dict[str, Tensor], img_size: tuple[int, int]) -> None: ...


def load_pretrained(model: Loadable, path: str | Path, *, use_ema: bool = False) -> None:
    """Load a published checkpoint, or one like it, from a file: safetensors, or what `torch.save` writes.

    The position tables are resized to the model's grid and frames. The first convolution is adapted to the model's
    channels and, if image weights go to a model of clips, to its tubelets. The head is replaced, with a warning, only
    if the model was built for another number of classes than its tag has, or image weights go to a model of clips.

    Args:
        model: made by `timm.create_model`.
        use_ema: load the running average instead of the raw weights, whose accuracies are the published ones. A file
            whose name ends in `_ema` is published for its average, which is loaded in any case.

    Raises:
        UserError: the file is missing, damaged or holds more than tensors and plain values; or a tensor is missing,
            left over, of another shape or not finite.
    """
    model.load_state_dict(adapt(read_checkpoint(Path(path)), model, path, use_ema=use_ema))


def checkpoint_filter_fn(state_dict: dict[str, object], model: Loadable) -> Mapping[str, Tensor]:
    """Adapt and check a state dict that timm has read, as :func:`load_pretrained` does.

    Raises:
        UserError: a tensor is missing, left over, of another shape or not finite.
    """
    cfg = model.pretrained_cfg
    hub = "/".join(part for part in (cfg.get("hf_hub_id"), cfg.get("hf_hub_filename")) if part)
    weights = adapt(state_dict, model, cfg.get("file") or hub or "the checkpoint")
    cfg["num_classes"] = model.num_classes  # otherwise timm would replace a head of another number of classes
    return weights


def cannot_download(cfg: TagFacts, error: OSError) -> UserError:
    """The error for a tag's weights that cannot be downloaded."""
    url = cfg.get("url")
    if "hf_hub_id" in cfg:
        url = hf_hub_url(cfg["hf_hub_id"], cfg.get("hf_hub_filename", ""))
    reason = describe(error).partition(". ")[0]
    return UserError(
        f'cannot download {url}: {reason}; for a file that you have, pass pretrained_cfg_overlay={{"file": PATH}}'
    )


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a file of tensors and plain values to the CPU; nothing in it is run.

    Raises:
        UserError: the file is missing, damaged, or holds anything else.
    """
    if not path.is_file():
        raise no_such("checkpoint", path)
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        _inspect(path)
        with path.open("rb") as file, torch.serialization.safe_globals(READ_AS):  # torch opens no path but UTF-8
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # torch raises many kinds, with advice to load unsafely
        reason = describe(error).rpartition("WeightsUnpickler error: ")[2].partition("In PyTorch ")[0].strip()
        raise UserError(
            f"cannot read {path} as a checkpoint: it is damaged, or not what safetensors or torch.save wrote "
            f"({reason.splitlines()[0][:120] if reason else type(error).__name__})"
        ) from error
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path} is not a checkpoint: expected a dict of tensors, got {type(checkpoint).__name__}")
    _drop_attributes(checkpoint)
    return checkpoint


def _drop_attributes(checkpoint: dict[str, Any]) -> None:
    """Take from all dicts the attributes that the file gives them, since such an attribute can hide a method."""
    left: list[Any] = [checkpoint]
    seen = set()  # a dict can hold itself
    while left:
        value = left.pop()
        if id(value) in seen or not isinstance(value, dict | list | tuple):
            continue
        seen.add(id(value))
        if isinstance(value, OrderedDict | Counter):
            vars(value).clear()
        left += dict.values(value) if isinstance(value, dict) else value


def _inspect(path: Path) -> None:
    """Refuse a file that would exhaust torch's reader, crash it, or pass it damaged; name the calls it would refuse."""
    with path.open("rb") as file:
        start = file.read(4)
    if start != b"PK\x03\x04" or not zipfile.is_zipfile(path):  # torch looks at the start only, zipfile at the end
        raise UserError(
            f"cannot read {path} as a checkpoint: expected safetensors, or what torch.save writes since PyTorch 1.6"
        )
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        unpacked = sum(member.file_size for member in members)
        if unpacked > 4 * path.stat().st_size:  # torch.save compresses nothing, torch.jit.save a little
            raise UserError(f"{path} is not a checkpoint: its {path.stat().st_size} bytes would unpack to {unpacked}")
        if not any(member.CRC for member in members):  # torch.save can leave out checksums; then check none
            for member in members:
                del member.CRC
        damaged = archive.testzip()
        if damaged:
            raise UserError(f"{path} is damaged: {damaged} in it does not match its checksum")
    with path.open("rb") as file:
        pickle = torch._C.PyTorchFileReader(file).get_record("data.pkl")  # as torch finds it: in any case of letters
    _check_opcodes(pickle, path)


def _check_opcodes(pickle: bytes, path: Path) -> None:
    """Refuse a pickle that takes too long, or calls what is not :data:`HARMLESS` or :data:`UNREAD`.

    Torch runs `_codecs.encode` itself, as numpy's bytes need it. Only numpy's own way is let through, a string to
    latin1 where the function stands on the stack, since other codecs, and long strings again and again, fill memory.
    """
    counts = dict.fromkeys(MOST, 0)
    memo: dict[object, tuple[str, Any]] = {}
    last: deque[tuple[str, Any]] = deque(maxlen=5)
    encoded = 0
    for opcode, argument, _ in pickletools.genops(pickle):
        code = opcode.name
        for part, (most, values) in MOST.items():
            counts[part] += part in code
            if counts[part] > most:
                raise UserError(f"{path} is not a checkpoint: it holds more than {most} {values}")
        if "PUT" in code:
            memo[argument] = last[-1]
            continue
        last.append(memo.get(argument, (code, None)) if "GET" in code else (code, argument))
        if code == "GLOBAL" and last[-1] != ENCODE:
            name = str(argument).replace(" ", ".")
            if not HARMLESS.fullmatch(name) and name.replace("__builtin__", "builtins") not in UNREAD:
                raise _refused_call(name, path)
        if len(last) == 5 and last[0] == ENCODE:
            (kind, text), encoding, *rest = list(last)[1:]
            encoded += len(text) if kind == "BINUNICODE" else 0
            numpys = kind == "BINUNICODE" and encoding == LATIN1 and [code for code, _ in rest] == ["TUPLE2", "REDUCE"]
            if not numpys or encoded > len(pickle):
                raise _refused_call("_codecs.encode", path)


def _refused_call(name: str, path: Path) -> UserError:
    return UserError(
        f"cannot read {path} as a checkpoint: it calls {name!a}, "
        "which no dense tensor or plain value needs; nothing of it was run. "
        "If you trust the file, save its state dict alone where its training code runs"
    )


def adapt(
    checkpoint: Mapping[str, object], model: Loadable, source: str | Path, *, use_ema: bool = False
) -> dict[str, Tensor]:
    """Turn the content of a checkpoint into a state dict of the model; see :func:`load_pretrained`."""
    weights = rename(checkpoint, model, source, use_ema=use_ema)
    _adapt_channels(weights, model)
    _choose_head(weights, model, source)
    size = model.pretrained_model_args.get("img_size") or model.pretrained_cfg["input_size"][-2:]
    model.adapt_weights(weights, to_2tuple(size))
    for key, tensor in model.state_dict().items():
        if key.endswith(COUNTER):
            weights.setdefault(key, tensor)
    check_fit(weights, model, source)
    cfg = model.pretrained_cfg
    if cfg.get("license", "").startswith("cc-by-nc") and cfg.get("source") != "local-dir":  # a folder is the user's own
        _note_licence(cfg["license"], cfg.get("origin_url", ""))
    return weights


@cache
def _note_licence(licence: str, origin: str) -> None:
    """Log once a process that weights are not for every use."""
    _logger.warning("The published weights of %s are for non-commercial use only: their licence is %s", origin, licence)


def rename(
    checkpoint: Mapping[str, object], model: Loadable, source: str | Path, *, use_ema: bool = False
) -> dict[str, Tensor]:
    """Return the state dict in a checkpoint, without wrappers and prefixes, under the model's names.

    Raises:
        UserError: `use_ema`, and the checkpoint holds no running average; or an entry is no dense floating-point
            tensor; or the family knows that the weights are of another of its models.
    """
    weights, names = _unwrap(checkpoint, source, use_ema=use_ema), None
    while names != weights.keys():  # a family's prefix can hide a wrapper's, and the reverse
        names = weights.keys()
        try:
            weights = model.rename_weights(_strip_prefixes(weights))
        except ValueError as error:
            raise UserError(f"{source} is of another model: {error}") from None
    tensors = _check_tensors(weights, source, model.state_dict())
    head = tensors.get(HEAD[0])
    if head is not None and (head.dim() != 2 or not head.numel()):  # its rows become a model's classes
        shape = tuple(head.shape)
        raise UserError(
            f"{source} is of another model: {HEAD[0]} is {shape} there and (classes, features) in the model"
        )
    return tensors


def _unwrap(checkpoint: Mapping[str, object], source: str | Path, *, use_ema: bool) -> dict[str, object]:
    """Return the state dict that a trainer has saved beside its own state: a running average only if asked for.

    A file whose name ends in `_ema` is published for its running average: it asks for it. A file without raw weights
    has nothing but its running average to load.
    """
    averages = [key for key in EMA_WRAPPERS if isinstance(checkpoint.get(key), dict)]
    if use_ema and not averages:
        raise UserError(f"{source} holds no running average of the weights: expected {' or '.join(EMA_WRAPPERS)}")
    average_first = use_ema or Path(source).stem.endswith("_ema")
    wrappers = (*EMA_WRAPPERS, *WRAPPERS) if average_first else (*WRAPPERS, *EMA_WRAPPERS)
    for _ in range(MOST_WRAPPERS):
        wrapped = [value for key in wrappers if isinstance(value := checkpoint.get(key), dict)]
        if not wrapped:
            break
        checkpoint, wrappers = wrapped[0], (*WRAPPERS, *EMA_WRAPPERS)
    for key in checkpoint:
        if not isinstance(key, str):  # not printed either: a tuple can be endless
            raise UserError(f"{source} holds no state dict: expected names of tensors, got a {type(key).__name__}")
    weights = {key: value for key, value in checkpoint.items() if key not in AVERAGED}
    return weights if all(key.startswith("module.") for key in weights) else dict(checkpoint)


def _strip_prefixes(weights: dict[str, object]) -> dict[str, object]:
    """Remove the prefixes that all names share, as wrappers of training code add them."""
    prefix: str | None = ""
    while prefix is not None:
        weights = {key.removeprefix(prefix): value for key, value in weights.items()}
        shared = (prefix for prefix in PREFIXES if weights and all(key.startswith(prefix) for key in weights))
        prefix = next(shared, None)
    return weights


def _check_tensors(
    weights: Mapping[str, object], source: str | Path, state: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Return the weights if all are dense, and floating-point or of the type that they have in a model's `state`."""
    if not isinstance(weights, Mapping):
        raise UserError(f"{source} holds no state dict: expected a dict of tensors, got {type(weights).__name__}")
    tensors, integers = {}, {key: tensor.dtype for key, tensor in (state or {}).items()}  # of a batch norm
    for key, value in weights.items():
        if not isinstance(value, Tensor):
            raise UserError(
                f"{source} holds no state dict: {key} is a {type(value).__name__}, not a tensor; {_names(weights)}"
            )
        # a counter that the model lacks is left over, which check_fit says
        sound = value.is_floating_point() or value.dtype == integers.get(key, key.endswith(COUNTER) and torch.int64)
        dense = sound and value.layout == torch.strided and not value.is_meta
        if not dense or value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise UserError(
                f"{source} has {key} as {value.dtype}, {value.layout}, on {value.device}: "
                f"expected all numbers of a floating-point tensor of shape {tuple(value.shape)}"
            )
        tensors[key] = value
    return tensors


def _names(weights: Mapping[str, object]) -> str:
    """What a file has in place of a model's names, for an error."""
    first = ", ".join(list(weights)[:8])
    return f"its entries are {first}{', ...' if len(weights) > 8 else ''}" if weights else "it is empty"


def _adapt_channels(weights: dict[str, Tensor], model: Loadable) -> None:
    """Adapt the first convolution of weights for colour images to the model's channels, in place."""
    name = _first_conv(model)
    weight = weights.get(name)
    if weight is not None and weight.dim() in (4, 5) and weight.shape[1] == 3 != model.in_chans:
        adapted = adapt_input_conv(model.in_chans, weight.flatten(2, -2))  # timm's function takes four dimensions
        weights[name] = adapted.unflatten(2, weight.shape[2:-1])


def _choose_head(weights: dict[str, Tensor], model: Loadable, source: str | Path) -> None:
    """Keep the file's head, drop it for a model without a head, or replace it by the model's new one, in place.

    It is replaced where it has another number of classes, and this was asked for: the model was built with another
    number than its tag has, or takes clips where the file's takes images.
    """
    state = model.state_dict()
    new = {key: state[key] for key in HEAD if key in state}
    if not new:
        for key in HEAD:
            weights.pop(key, None)
        return
    found = [weights[key].shape for key in HEAD if key in weights]
    classes = found[0][0] if found and found[0] else 0
    sound = not found or found[1:] == [(classes,)]  # otherwise check_fit names the fault
    convs = [tensors[_first_conv(model)].dim() for tensors in (weights, state) if _first_conv(model) in tensors]
    wanted = convs == [4, 5] or model.num_classes != model.pretrained_cfg.get("num_classes")
    if sound and wanted and classes != model.num_classes:
        _logger.warning("The head is new: %s was not trained on %d classes", source, model.num_classes)
        weights.update(new)


def _first_conv(model: Loadable) -> str:
    return f"{model.pretrained_cfg['first_conv']}.weight"


def of_now(weights: Mapping[str, Tensor], model: object) -> dict[str, Any]:
    """Return the weights that a run has saved, without those that earlier versions of its model had."""
    return model.rename_weights(dict(weights)) if isinstance(model, Loadable) else dict(weights)


def check_fit(weights: Mapping[str, object], model: Loadable | nn.Module, source: str | Path) -> None:
    """Refuse weights that do not fit a model: all of its tensors, no others, of the same shapes, and finite.

    Raises:
        UserError: names the source, the first tensor that does not fit, and its shape there and in the model.
    """
    state = model.state_dict()
    tensors = _check_tensors(weights, source, state)
    wanted = {key: tuple(tensor.shape) for key, tensor in state.items()}
    found = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    wrong = [key for key in {**wanted, **found} if found.get(key) != wanted.get(key)]
    if wrong:
        first = wrong[0]
        more = f", and {len(wrong) - 1} more differ" if len(wrong) > 1 else ""
        hint = ": num_classes must be the file's, or 0" if first in HEAD else ""
        if first == HEAD[0] and first in found and found[first][:1] == wanted.get(first, ())[:1]:
            hint = ": global_pool must be the file's, or num_classes 0"  # Mamba-R's head is as wide as what is pooled
        if first not in wanted and first not in of_now(tensors, model):
            hint = f": an earlier version saved it, so train anew from it, model.pretrained_cfg_overlay.file={source}"
        if not wanted.keys() & found.keys():
            hint = f"; {_names(weights)}"
        raise UserError(
            f"{source} is of another model: {first} is {found.get(first, 'missing')} there "
            f"and {wanted.get(first, 'missing')} in the model{more}{hint}"
        )
    for key, tensor in tensors.items():
        finite = tensor.isfinite() & tensor.to(state[key].dtype).isfinite()  # NaN is lost in integers
        bad = tensor.numel() - int(finite.sum())
        if bad:
            raise UserError(f"{source} is broken: {key} holds {bad} numbers that are not finite, of {tensor.numel()}")
