"""A scan as a matrix over tokens: y[i] = sum over j of M[i, j] x[j], the hidden attention of Mamba.

Source: https://arxiv.org/abs/2403.01590. Sizes: b images, l tokens, d channels, n states.
"""

from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 2**24  # numbers in a tensor (b, l, channels, n) at most: channels are taken in chunks


class Selection(NamedTuple):
    """What one direction of a scan selects, float32 or float64, in the order in which it runs."""

    dt: Tensor  # (b, l, d), after bias and softplus
    A: Tensor  # (d, n)
    B: Tensor  # (b, l, d, n), which may be expanded over the channels
    C: Tensor  # (b, l, d, n)
    D: Tensor  # (d,)


def sum_of_channels(scan: Selection, queries: Tensor, keys: Tensor) -> Tensor:
    """Return the matrix (b, l, l) whose [i, j] is the sum over channels of ``queries[i] M[i, j] keys[j]``.

    A block of the matrix in which each row's token follows each column's is one product of matrices: the decay between
    the two tokens is split at a token between the rows and the columns. No exponent is positive.

    Args:
        queries, keys: (b, l, d), factors of the rows and of the columns.
    """
    b, l, d = scan.dt.shape
    width = max(1, CHUNK // (b * l * scan.A.shape[1]))
    parts = (slice(start, start + width) for start in range(0, d, width))
    return torch.stack([_sum_of_chunk(scan, queries, keys, part) for part in parts]).sum(0)


def _sum_of_chunk(scan: Selection, queries: Tensor, keys: Tensor, part: slice) -> Tensor:
    dt, A = scan.dt[..., part], scan.A[part]
    total = dt.cumsum(1).unsqueeze(-1)  # (b, l, d, 1)
    rows = scan.C[:, :, part] * queries[..., part].unsqueeze(-1)  # (b, l, d, n)
    columns = scan.B[:, :, part] * (dt * keys[..., part]).unsqueeze(-1)
    b, l = dt.shape[:2]
    matrix = torch.diag_embed((rows * columns).flatten(2).sum(2))
    size = 1
    while size < l:
        for middle in range(size, l, 2 * size):
            left, right = slice(middle - size, middle), slice(middle, min(middle + size, l))
            split = total[:, middle - 1 : middle]
            since = (rows[:, right] * torch.exp(A * (total[:, right] - split))).flatten(2)
            until = (columns[:, left] * torch.exp(A * (split - total[:, left]))).flatten(2)
            matrix[:, right, left] = torch.bmm(since, until.transpose(1, 2))
        size *= 2
    return matrix


def row(scan: Selection, index: int) -> Tensor:
    """Return the matrix's row of one token for every channel, (b, d, l), without the matrix: in time linear in l."""
    dt = scan.dt[:, : index + 1]
    total = dt.cumsum(1)
    decay = torch.exp(scan.A * (total[:, -1:] - total).unsqueeze(-1))  # (b, l, d, n)
    weights = dt * (scan.C[:, index : index + 1] * decay * scan.B[:, : index + 1]).sum(-1)
    return torch.nn.functional.pad(weights, (0, 0, 0, scan.dt.shape[1] - index - 1)).transpose(1, 2)


def of_channels(scan: Selection) -> Tensor:
    """Return the matrix of every channel, (b, d, l, l)."""
    return torch.stack([row(scan, index) for index in range(scan.dt.shape[1])], dim=2)
