"""Published weights to ours: files are read without running anything in them, and every tensor is accounted for."""

import argparse
import logging
import math
import pickletools
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from timm.layers import to_2tuple
from timm.models import adapt_input_conv
from torch import Tensor, nn

from vim.errors import UserError, describe
from vim.layers import NUM_CLASS_TOKENS, resize_position_table, resize_temporal_table

WRAPPERS = ("model", "module", "state_dict")
EMA_WRAPPERS = ("model_ema", "state_dict_ema")
PREFIXES = ("module.", "backbone.", "encoder.", "_orig_mod.")
UNUSED = ("rope.", "distill_head.", "clip_decoder.", "clip_teacher.", "pool_norm.")
IMAGES_AND_TEXT = "vision_encoder."  # of a model of both: the part that is ours
FIRST_CONV = "patch_embed.proj.weight"
TIMES = "temporal_pos_embedding"
HEAD = ("head.weight", "head.bias")
# of what torch's own reader lets a file call, the part that needs no more memory than the file
HARMLESS = re.compile(
    r"argparse\.Namespace|collections\.(OrderedDict|Counter)|(builtins|__builtin__)\.(set|complex)"
    r"|torch\.(Size|device|\w+Storage|bool|u?int\d+|b?float\d+|complex\d+)"
    r"|torch\._utils\._rebuild_(tensor_v2|parameter)"
)
MOST_TUPLES = 100_000  # a tensor takes about four; a million in one another crash the interpreter

_logger = logging.getLogger(__name__)


def load_pretrained(model: nn.Module, path: str | Path, *, use_ema: bool = False) -> None:
    """Load a published checkpoint, or one like it, from a file: safetensors, or what `torch.save` writes.

    The position tables are resized to the model's grid and frames, and the first convolution is adapted to its channels
    and, where image weights go to a model of clips, to its tubelets. The head is drawn anew, with a warning, only where
    the model was asked for another number of classes than its weights' tag has, or has others than image weights.

    Args:
        model: made by `timm.create_model`.
        use_ema: load the running average, not the raw weights that the published accuracies are of.

    Raises:
        UserError: the file is missing, damaged or holds more than tensors and plain values; or a tensor is missing,
            left over, of another shape or not finite.
    """
    model.load_state_dict(adapt(read_checkpoint(Path(path)), model, path, use_ema=use_ema))


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """What timm has read, adapted and checked as :func:`load_pretrained` does.

    Raises:
        UserError: a tensor is missing, left over, of another shape or not finite.
    """
    cfg: Any = model.pretrained_cfg
    weights = adapt(state_dict, model, cfg.get("file") or cfg.get("hf_hub_id") or "the checkpoint")
    cfg["num_classes"] = model.num_classes  # else timm would take the head for one of other classes, and draw a new one
    return weights


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a file of tensors and plain values to the CPU; nothing in it is run.

    Raises:
        UserError: the file is missing, damaged, or holds anything else.
    """
    if not path.is_file():
        raise UserError(f"no such checkpoint: {path}")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        _inspect(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # the training code's options
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
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
    return checkpoint


def _inspect(path: Path) -> None:
    """Refuse what torch's reader would run out of memory or crash on, or take damaged; name what it would not call."""
    with path.open("rb") as file:
        start = file.read(4)
    if start != b"PK\x03\x04" or not zipfile.is_zipfile(path):  # torch goes by the start alone, zipfile by the end
        raise UserError(
            f"cannot read {path} as a checkpoint: expected safetensors, or what torch.save writes since PyTorch 1.6"
        )
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        unpacked = sum(member.file_size for member in members)
        if unpacked > 4 * path.stat().st_size:  # torch.save compresses nothing, torch.jit.save a little
            raise UserError(f"{path} is not a checkpoint: its {path.stat().st_size} bytes would unpack to {unpacked}")
        if not any(member.CRC for member in members):  # torch.save can leave checksums out; then none are looked at
            for member in members:
                del member.CRC
        damaged = archive.testzip()
        if damaged:
            raise UserError(f"{path} is damaged: {damaged} in it does not match its checksum")
    pickle = torch._C.PyTorchFileReader(str(path)).get_record("data.pkl")  # the one that torch finds: any case will do
    opcodes = [(code.name, argument) for code, argument, _ in pickletools.genops(pickle)]
    for name in (str(argument).replace(" ", ".") for code, argument in opcodes if code == "GLOBAL"):
        if not HARMLESS.fullmatch(name):
            raise UserError(
                f"cannot read {path} as a checkpoint: it calls {name!a}, "
                "which no dense tensor or plain value needs; nothing of it was run"
            )
    if sum("TUPLE" in code for code, _ in opcodes) > MOST_TUPLES:
        raise UserError(f"{path} is not a checkpoint: it holds more than {MOST_TUPLES} tuples")


def adapt(checkpoint: dict[str, Any], model: Any, source: str | Path, *, use_ema: bool = False) -> dict[str, Tensor]:
    """The state dict for a model out of what :func:`read_checkpoint` read; see :func:`load_pretrained`."""
    weights = rename(checkpoint, source, use_ema=use_ema)
    _adapt_channels(weights, model)
    inflated = _inflate(weights, model)
    _choose_head(weights, model, source, of_other_inputs=inflated)
    _resize_tables(weights, model)
    check_fit(weights, model, source)
    return weights


def rename(checkpoint: dict[str, Any], source: str | Path, *, use_ema: bool = False) -> dict[str, Any]:
    """The state dict in a checkpoint, without wrappers and prefixes, under our names.

    Raises:
        UserError: there is no running average, and it is asked for; or what is no dense floating-point tensor.
    """
    for key in EMA_WRAPPERS if use_ema else WRAPPERS:
        if isinstance(checkpoint.get(key), dict):
            checkpoint, use_ema = checkpoint[key], False
    if use_ema:
        raise UserError(f"{source} holds no running average of the weights: expected {' or '.join(EMA_WRAPPERS)}")
    for key in checkpoint:
        if not isinstance(key, str):  # nor written out: a tuple can be endless
            raise UserError(f"{source} holds no state dict: expected names of tensors, got a {type(key).__name__}")
    weights = checkpoint
    if any(key.startswith(IMAGES_AND_TEXT) for key in weights):
        weights = {
            key.removeprefix(IMAGES_AND_TEXT): value
            for key, value in weights.items()
            if key.startswith(IMAGES_AND_TEXT)
        }
    prefix: str | None = ""
    while prefix is not None:
        weights = {key.removeprefix(prefix): value for key, value in weights.items()}
        weights = {key: value for key, value in weights.items() if not key.startswith(UNUSED)}
        shared = (prefix for prefix in PREFIXES if weights and all(key.startswith(prefix) for key in weights))
        prefix = next(shared, None)
    if "norm.weight" in weights and "norm_f.weight" not in weights:  # masked pre-training calls it so
        weights["norm_f.weight"] = weights.pop("norm.weight")
    _check_tensors(weights, source)
    return weights


def _check_tensors(weights: Mapping[str, Any], source: str | Path) -> None:
    if not isinstance(weights, Mapping):
        raise UserError(f"{source} holds no state dict: expected a dict of tensors, got {type(weights).__name__}")
    for key, value in weights.items():
        if not isinstance(value, Tensor):
            raise UserError(f"{source} holds no state dict: {key} is a {type(value).__name__}, not a tensor")
        dense = value.layout == torch.strided and not value.is_meta and value.is_floating_point()
        if not dense or value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise UserError(
                f"{source} has {key} as {value.dtype}, {value.layout}, on {value.device}: "
                f"expected all numbers of a floating-point tensor of shape {tuple(value.shape)}"
            )
        if key == HEAD[0] and (value.dim() != 2 or not value.numel()):  # a model is built with as many classes
            shape = tuple(value.shape)
            raise UserError(
                f"{source} is of another model: {key} is {shape} there and (classes, features) in the model"
            )


def _choose_head(weights: dict[str, Tensor], model: Any, source: str | Path, *, of_other_inputs: bool) -> None:
    """Keep the file's head where it fits, drop it for a model without; else a new one, if other classes are wanted.

    They are if the model was asked for them, or takes clips where the file's takes images.
    """
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items() if key in HEAD}
    if not shapes:
        for key in HEAD:
            weights.pop(key, None)
        return
    found = [weights[key].shape for key in HEAD if key in weights]
    classes = found[0][0] if found and found[0] else 0
    sound = found in ([], [(classes, model.embed_dim), (classes,)])  # else check_fit says what is wrong
    wanted = of_other_inputs or model.num_classes != model.pretrained_cfg.get("num_classes")
    if sound and wanted and classes != model.num_classes:
        _logger.warning("The head is new: %s was not trained on %d classes", source, model.num_classes)
        weights.update({key: tensor for key, tensor in model.state_dict().items() if key in HEAD})


def _adapt_channels(weights: dict[str, Tensor], model: Any) -> None:
    weight = weights.get(FIRST_CONV)
    if weight is not None and weight.dim() in (4, 5) and weight.shape[1] == 3 != model.in_chans:
        adapted = adapt_input_conv(model.in_chans, weight.flatten(2, -2))  # it takes four dimensions
        weights[FIRST_CONV] = adapted.unflatten(2, weight.shape[2:-1])


def _inflate(weights: dict[str, Tensor], model: Any) -> bool:
    """Make image weights, if they are, those of a model of clips: tubelets for patches, and no position in time."""
    weight, state = weights.get(FIRST_CONV), model.state_dict()
    if weight is None or weight.dim() != 4 or state[FIRST_CONV].dim() != 5:
        return False
    tubelet_size = state[FIRST_CONV].shape[2]
    if model.inflation == "average":
        inflated = weight.unsqueeze(2).repeat(1, 1, tubelet_size, 1, 1) / tubelet_size
    else:
        inflated = weight.new_zeros(*weight.shape[:2], tubelet_size, *weight.shape[2:])
        inflated[:, :, tubelet_size // 2] = weight
    weights[FIRST_CONV] = inflated
    weights.setdefault(TIMES, torch.zeros_like(state[TIMES], device="cpu"))
    return True


def _resize_tables(weights: dict[str, Tensor], model: Any) -> None:
    """To the model's grid and times. A table that is none is left to check_fit."""

    def is_table(key: str) -> bool:
        shape = weights[key].shape if key in weights else ()
        return len(shape) == 3 and (shape[0], shape[2]) == (1, model.embed_dim) and shape[1] > 0 and hasattr(model, key)

    if is_table("pos_embed"):
        grid = _grid(weights["pos_embed"].shape[1] - NUM_CLASS_TOKENS[model.class_token], model)
        if grid is not None:
            new_grid = model.patch_embed.grid_size
            weights["pos_embed"] = resize_position_table(weights["pos_embed"], grid, new_grid, model.class_token)
    if is_table(TIMES):
        weights[TIMES] = resize_temporal_table(weights[TIMES], model.patch_embed.num_tubelets)


def _grid(patches: int, model: Any) -> tuple[int, int] | None:
    """Rows and columns of a position table: as the source says, else the model's, else a square; None if no such is."""
    args, cfg = model.pretrained_model_args, model.pretrained_cfg
    size = args.get("img_size") or cfg["input_size"][-2:]
    side = math.isqrt(max(patches, 0))
    for rows, columns in (model.patch_embed.feat_size(to_2tuple(size)), model.patch_embed.grid_size, (side, side)):
        if rows * columns == patches > 0:
            return rows, columns
    return None


def check_fit(weights: Mapping[str, Tensor], model: nn.Module, source: str | Path) -> None:
    """Refuse weights that are not a model's, all of them, of the same shapes, and finite.

    Raises:
        UserError: names the source, the first tensor that does not fit, and its shape there and in the model.
    """
    _check_tensors(weights, source)
    state = model.state_dict()
    wanted = {key: tuple(tensor.shape) for key, tensor in state.items()}
    found = {key: tuple(tensor.shape) for key, tensor in weights.items()}
    wrong = [key for key in {**wanted, **found} if found.get(key) != wanted.get(key)]
    if wrong:
        first = wrong[0]
        more = f", and {len(wrong) - 1} more differ" if len(wrong) > 1 else ""
        hint = ": num_classes must be the file's, or 0" if first in HEAD else ""
        raise UserError(
            f"{source} is of another model: {first} is {found.get(first, 'missing')} there "
            f"and {wanted.get(first, 'missing')} in the model{more}{hint}"
        )
    for key, tensor in weights.items():
        bad = tensor.numel() - int(tensor.to(state[key].dtype).isfinite().sum())
        if bad:
            raise UserError(f"{source} is broken: {key} holds {bad} numbers that are not finite, of {tensor.numel()}")
