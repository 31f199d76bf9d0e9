"""A scan as a matrix over tokens: y[i] = sum over j of M[i, j] x[j], the hidden attention of Mamba.

Source: https://arxiv.org/abs/2403.01590. Sizes: b images, l tokens, d channels, n states.
"""

from typing import NamedTuple

import torch
from torch import Tensor

MOST = 2**24  # numbers of a tensor (b, l, d, n): channels are taken in chunks of no more


class Selection(NamedTuple):
    """What one direction of a scan selects, float32 or float64, in the order in which it runs."""

    dt: Tensor  # (b, l, d), after bias and softplus
    A: Tensor  # (d, n)
    B: Tensor  # (b, l, d, n)
    C: Tensor  # (b, l, d, n)
    D: Tensor  # (d,)


def sum_of_channels(scan: Selection, queries: Tensor, keys: Tensor) -> Tensor:
    """Return the matrix (b, l, l) whose [i, j] is the sum over channels of ``queries[i] M[i, j] keys[j]``.

    Args:
        queries, keys: (b, l, d), factors of the rows and of the columns.
    """
    matrix = queries.new_zeros(1)
    for part in _chunks(scan):
        rows = scan.C[:, :, part] * queries[..., part].unsqueeze(-1)
        columns = scan.B[:, :, part] * keys[..., part].unsqueeze(-1)
        matrix = matrix + _multiply(scan.dt[..., part], scan.A[part], rows, columns, "bidn,bjdn->bij")
    return matrix


def of_channels(scan: Selection) -> Tensor:
    """Return the matrix M of every channel, (b, d, l, l)."""
    parts = [
        _multiply(scan.dt[..., part], scan.A[part], scan.C[:, :, part], scan.B[:, :, part], "bidn,bjdn->bdij")
        for part in _chunks(scan)
    ]
    return torch.cat(parts, dim=1)


def _chunks(scan: Selection) -> list[slice]:
    b, l, d = scan.dt.shape
    width = max(1, MOST // (b * l * scan.A.shape[1]))
    return [slice(start, start + width) for start in range(0, d, width)]


def _multiply(dt: Tensor, A: Tensor, rows: Tensor, columns: Tensor, equation: str) -> Tensor:
    """Return the products of rows and columns (b, l, d, n) with the decay between their tokens, by an einsum equation.

    A block in which each row's token follows each column's is one product: the decay is split at a token between them.
    No exponent is positive. The blocks double from one token to half of the sequence.
    """
    l = dt.shape[1]
    columns = columns * dt.unsqueeze(-1)
    total = dt.cumsum(1).unsqueeze(-1)  # (b, l, d, 1)
    summed = torch.einsum(equation.replace("j", "i").replace("ii", "i"), rows, columns)  # where the tokens are the same
    matrix = torch.diag_embed(summed)
    size = 1
    while size < l:
        for middle in range(size, l, 2 * size):
            left, right = slice(middle - size, middle), slice(middle, middle + size)
            split = total[:, middle - 1 : middle]
            since = rows[:, right] * torch.exp(A * (total[:, right] - split))
            until = columns[:, left] * torch.exp(A * (split - total[:, left]))
            matrix[..., right, left] = torch.einsum(equation, since, until)
        size *= 2
    return matrix
