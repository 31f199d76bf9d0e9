"""Published weights to ours."""

import math
from typing import Any

from torch import Tensor

from vim.layers import NUM_CLASS_TOKENS, resize_position_table

PREFIXES = ("module.", "backbone.", "encoder.")
UNUSED = ("rope.", "distill_head.", "clip_decoder.", "clip_teacher.")


def filter_published(state_dict: dict[str, Any], model: Any) -> dict[str, Tensor]:
    """A published state dict under our names, its position table resized to the model's grid.

    A table of another size is taken for one of a square grid; of the same size, for one of the model's grid.

    Takes what the published training code saves ({"model": ..., "optimizer": ..., ...}) or a bare state dict, with or
    without the prefixes that wrappers leave behind.

    Raises:
        ValueError: a tensor is missing or not finite, or the table is not of a square grid.
    """
    for key in ("model", "module", "state_dict"):
        if isinstance(state_dict.get(key), dict):
            state_dict = state_dict[key]
    for prefix in PREFIXES:
        if all(key.startswith(prefix) for key in state_dict):
            state_dict = {key.removeprefix(prefix): value for key, value in state_dict.items()}
    state_dict = {key: value for key, value in state_dict.items() if not key.startswith(UNUSED)}
    if "norm.weight" in state_dict and "norm_f.weight" not in state_dict:  # masked pre-training calls it so
        state_dict["norm_f.weight"] = state_dict.pop("norm.weight")
    if "head.weight" in state_dict:  # timm drops the head where the classes are not as many as the file was trained on
        model.pretrained_cfg["num_classes"] = state_dict["head.weight"].shape[0]
    table = state_dict.get("pos_embed")
    if table is not None and table.shape[1:] != model.pos_embed.shape[1:]:
        patches = table.shape[1] - NUM_CLASS_TOKENS[model.class_token]
        side = math.isqrt(patches)
        if side * side != patches:
            raise ValueError(
                f"pos_embed must hold a square of patches and the class tokens ({model.class_token}) to be resized, "
                f"got {tuple(table.shape)} for {tuple(model.pos_embed.shape)}"
            )
        state_dict["pos_embed"] = resize_position_table(
            table, (side, side), model.patch_embed.grid_size, model.class_token
        )
    _check(state_dict, model)
    return state_dict


def _check(state_dict: dict[str, Any], model: Any) -> None:
    """Refuse what would leave a tensor random or the outputs NaN, even where timm loads leniently."""
    wanted = [key for key in model.state_dict() if not key.startswith("head.")]
    missing = [key for key in wanted if key not in state_dict]
    if missing:
        raise ValueError(
            f"the checkpoint lacks {len(missing)} of the model's {len(wanted)} tensors, such as {missing[0]}"
        )
    for key in wanted:
        if not state_dict[key].isfinite().all():
            raise ValueError(f"the checkpoint's {key} holds numbers that are not finite")
