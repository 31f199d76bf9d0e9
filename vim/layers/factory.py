"""Where, and in which precision, a module's parameters are made: what PyTorch's constructors take."""

from typing import TypedDict

import torch


class Factory(TypedDict, total=False):
    """The last keywords of every constructor; a module passes them to its parts as `**dd`."""

    device: torch.device | str | None
    dtype: torch.dtype | None
