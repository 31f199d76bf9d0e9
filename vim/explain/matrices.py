"""A scan as a matrix over tokens: y[i] = sum over j of M[i, j] x[j], the hidden attention of Mamba.

Source: https://arxiv.org/abs/2403.01590. Sizes: b images, l tokens, d channels, n states.
"""

from typing import NamedTuple

import torch
from torch import Tensor

MOST = 2**19  # numbers of a tensor (b, l, d, n): channels are taken in chunks of no more, which a cache holds


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
    b, l, _ = scan.dt.shape
    matrix = scan.dt.new_zeros(b, l, l)
    for part in _chunks(scan):
        _add(matrix, scan, part, queries, keys, "bpidn,bpjdn->bijp")
    return matrix


def of_channels(scan: Selection) -> Tensor:
    """Return the matrix M of every channel, (b, d, l, l)."""
    b, l, d = scan.dt.shape
    matrix, ones = scan.dt.new_zeros(b, d, l, l), torch.ones_like(scan.dt)
    for part in _chunks(scan):
        _add(matrix[:, part], scan, part, ones, ones, "bpidn,bpjdn->bdijp")
    return matrix


def _chunks(scan: Selection) -> list[slice]:
    b, l, d = scan.dt.shape
    width = max(1, MOST // (b * l * scan.A.shape[1]))
    return [slice(start, start + width) for start in range(0, d, width)]


def _add(matrix: Tensor, scan: Selection, part: slice, queries: Tensor, keys: Tensor, equation: str) -> None:
    """Add the products of a chunk's rows and columns, with the decay between their tokens, by an einsum equation.

    The tokens are in blocks, at first of one token, which join to pairs until one is left. In a pair, each token of the
    second block follows each of the first, and so all their products are one matrix product: of rows that have decayed
    since the start of the second block, and columns that decay until the end of the first. No exponent is positive.
    """
    l, dt, A = matrix.shape[-1], scan.dt[..., part], scan.A[part]
    rows = scan.C[:, :, part] * queries[..., part].unsqueeze(-1)
    columns = scan.B[:, :, part] * (dt * keys[..., part]).unsqueeze(-1)
    matrix.diagonal(dim1=-2, dim2=-1).add_(
        torch.einsum(equation.replace("p", "").replace("j", "i").replace("ii", "i"), rows, columns)
    )
    rows *= _decay(dt, A)
    size = 1
    while size < l:
        even = l // (2 * size) * 2 * size
        for pairs in (slice(0, even), slice(even, l)):  # the last pair may lack a part of its second block
            length = min(2 * size, pairs.stop - pairs.start)
            if length <= size:
                continue
            first, second = slice(0, size), slice(size, length)
            row, column, step = (t[:, pairs].unflatten(1, (-1, length)) for t in (rows, columns, dt))
            blocks = matrix[..., pairs, pairs].unflatten(-1, (-1, length)).unflatten(-3, (-1, length))
            blocks = blocks.diagonal(dim1=-4, dim2=-2)[..., second, first, :]
            blocks += torch.einsum(equation, row[:, :, second], column[:, :, first])
            row[:, :, second] *= _decay(step[:, :, first].sum(2, keepdim=True), A)
            column[:, :, first] *= _decay(step[:, :, second].sum(2, keepdim=True), A)
        size *= 2


def _decay(steps: Tensor, A: Tensor) -> Tensor:
    """Return how much the states (..., d, n) keep in steps (..., d)."""
    return torch.exp(steps.unsqueeze(-1) * A)
