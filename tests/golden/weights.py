"""Weights as a function of their names, so that two implementations hold the same ones without sharing a file."""

import math
import zlib

import torch
from torch import Tensor


def generate(seed: int, shape: tuple[int, ...] | list[int]) -> Tensor:
    """Standard normal numbers, float32."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))


def weight(key: str, shape: list[int]) -> Tensor:
    """Return the tensor of a published name: noise seeded with the name's CRC-32, scaled as usual for its kind."""
    noise = generate(zlib.crc32(key.encode()), shape)
    name = key.rpartition(".")[2]
    if name == "num_batches_tracked":
        return torch.zeros(shape)
    if name == "running_var":
        return torch.exp(0.2 * noise)
    if name in ("gamma_1", "gamma_2"):  # layer scales, large enough for their branches to be seen
        return 0.5 + 0.1 * noise
    if name in ("A_log", "A_b_log", "A_logs"):
        return torch.arange(1, shape[-1] + 1).log().expand(shape) + 0.1 * noise
    if name in ("D", "D_b", "Ds") or (name == "weight" and len(shape) == 1):
        return 1 + 0.1 * noise
    if name in ("dt_bias", "dt_projs_bias") or (name == "bias" and "dt_proj" in key):
        steps = 0.5 * noise - 4
        return 0.5 * steps if key.startswith("levels.") else steps  # MambaVision adds it twice
    if name in ("bias", "running_mean", "init_states"):
        return 0.02 * noise
    if name in ("pos_embed", "pos_embed_cls", "cls_token", "temporal_pos_embedding"):
        return 0.2 * noise
    if name in ("x_proj_weight", "dt_projs_weight"):  # linear maps, stacked
        return noise / math.sqrt(shape[-1])
    if ".cpe" in key:  # x + conv(x), twice a block
        return 0.2 * noise / math.sqrt(math.prod(shape[1:]))
    return noise / math.sqrt(math.prod(shape[1:]))
