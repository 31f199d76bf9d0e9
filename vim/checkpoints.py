"""Published weights to ours."""

import math
from typing import Any

from torch import Tensor

from vim.layers import NUM_CLASS_TOKENS, resize_position_table

PREFIXES = ("module.", "backbone.", "encoder.")
UNUSED = ("rope.", "distill_head.", "clip_decoder.", "clip_teacher.")


def filter_published(state_dict: dict[str, Any], model: Any) -> dict[str, Tensor]:
    """A published state dict under our names, its position table resized to the model's grid.

    Takes what the published training code saves ({"model": ..., "optimizer": ..., ...}) or a bare state dict, with or
    without the prefixes that wrappers leave behind.
    """
    for key in ("model", "module", "state_dict"):
        if isinstance(state_dict.get(key), dict):
            state_dict = state_dict[key]
    for prefix in PREFIXES:
        if all(key.startswith(prefix) for key in state_dict):
            state_dict = {key.removeprefix(prefix): value for key, value in state_dict.items()}
    state_dict = {key: value for key, value in state_dict.items() if not key.startswith(UNUSED)}
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
    return state_dict
