"""How a model knows where a token is: class tokens, position tables and their resizing, and convolutions of maps."""

from typing import Literal, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .factory import Factory

ClassToken = Literal["middle", "first", "ends", "none"]
NUM_CLASS_TOKENS = {"middle": 1, "first": 1, "ends": 2, "none": 0}


def insert_class_tokens(patches: Tensor, tokens: Tensor, class_token: str) -> Tensor:
    """Put class tokens (b, 0 to 2, d) into a sequence of patches (b, l, d); "middle" is before patch l // 2."""
    if class_token == "middle":
        middle = patches.shape[1] // 2
        return torch.cat([patches[:, :middle], tokens, patches[:, middle:]], dim=1)
    if class_token == "first":
        return torch.cat([tokens, patches], dim=1)
    if class_token == "ends":
        return torch.cat([tokens[:, :1], patches, tokens[:, 1:]], dim=1)
    return patches


def split_class_tokens(sequence: Tensor, class_token: str) -> tuple[Tensor, Tensor]:
    """Undo :func:`insert_class_tokens`: return the patches (b, l, d) and the class tokens (b, 0 to 2, d)."""
    if class_token == "middle":
        middle = (sequence.shape[1] - 1) // 2
        patches = torch.cat([sequence[:, :middle], sequence[:, middle + 1 :]], dim=1)
        return patches, sequence[:, middle : middle + 1]
    if class_token == "first":
        return sequence[:, 1:], sequence[:, :1]
    if class_token == "ends":
        return sequence[:, 1:-1], torch.cat([sequence[:, :1], sequence[:, -1:]], dim=1)
    return sequence, sequence[:, :0]


def insert_registers(patches: Tensor, registers: Tensor) -> Tensor:
    """Spread m registers (b, m, d) through a sequence of patches (b, l, d): one after each l // (m + 1) patches.

    Source: https://arxiv.org/abs/2405.14858 (Mamba-R).
    """
    m = registers.shape[1]
    run = patches.shape[1] // (m + 1)
    runs = patches[:, : m * run].unflatten(1, (m, run))
    spread = torch.cat([runs, registers.unsqueeze(2)], dim=2).flatten(1, 2)
    return torch.cat([spread, patches[:, m * run :]], dim=1)


def split_registers(sequence: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """Undo :func:`insert_registers`: return the patches (b, l, d) and the m registers (b, m, d)."""
    run = (sequence.shape[1] - m) // (m + 1)
    spread = sequence[:, : m * (run + 1)].unflatten(1, (m, run + 1))
    patches = torch.cat([spread[:, :, :run].flatten(1, 2), sequence[:, m * (run + 1) :]], dim=1)
    return patches, spread[:, :, run]


def resize_position_table(
    table: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int], class_token: str
) -> Tensor:
    """Resize a table (1, l, d) to another grid: rows of patches bicubically in float32, rows of class tokens unchanged.

    The published Vim code takes the first row for the class token's. For a token in the middle, that shifts half of the
    patches by one and mixes the token's row into them.
    """
    if old_grid[0] == new_grid[0] and old_grid[1] == new_grid[1]:
        return table
    patches, tokens = split_class_tokens(table, class_token)
    grid = patches.reshape(1, old_grid[0], old_grid[1], -1).permute(0, 3, 1, 2)  # (1, d, rows, columns)
    grid = F.interpolate(grid.float(), size=new_grid, mode="bicubic", align_corners=False)
    return insert_class_tokens(grid.flatten(2).transpose(1, 2).to(table.dtype), tokens, class_token)


def resize_temporal_table(table: Tensor, num_tubelets: int) -> Tensor:
    """Resize a table (1, t, d) to another number of tubelets, linearly in float32."""
    if table.shape[1] == num_tubelets:
        return table
    resized = F.interpolate(table.transpose(1, 2).float(), size=num_tubelets, mode="linear", align_corners=False)
    return resized.transpose(1, 2).to(table.dtype).contiguous()  # safetensors saves contiguous tensors only


def find_table(weights: dict[str, Tensor], name: str, width: int) -> Tensor | None:
    """Return the tensor of that name if it is a table (1, l, width) with at least one row, otherwise None."""
    table = weights.get(name)
    if table is None or table.dim() != 3 or (table.shape[0], table.shape[2]) != (1, width) or not table.shape[1]:
        return None
    return table


class PositionConv(nn.Module):
    """``x + conv(x)`` with a 3 x 3 convolution of each channel: its zeros at the border tell positions apart.

    Source: https://arxiv.org/abs/2102.10882.
    """

    def __init__(self, dim: int, **dd: Unpack[Factory]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Map (b, rows, columns, c) to the same."""
        return x + self.conv(x.to(self.conv.weight.dtype).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
