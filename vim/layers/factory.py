"""How a module's parameters are made: where, in which precision, and with which first values."""

from typing import TypedDict

import torch
from timm.layers import trunc_normal_
from torch import nn


class Factory(TypedDict, total=False):
    """The last keywords of every constructor; a module passes them to its parts as `**dd`."""

    device: torch.device | str | None
    dtype: torch.dtype | None


def init_linears(model: nn.Module, *, but: str = "") -> None:
    """Draw the weights of all linear layers from a normal distribution with deviation 0.02, and zero their biases.

    Args:
        but: the name of layers that keep what they are.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] != but:
            trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
