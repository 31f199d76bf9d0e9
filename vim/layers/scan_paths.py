"""The orders in which scans visit the tokens of a clip or an image.

Sources: https://arxiv.org/abs/2403.06977 (VideoMamba), which finds "spatial_first" best; https://arxiv.org/abs/2401.10166
(VMamba's cross-scan of images).
"""

from typing import Literal, get_args

import torch
from timm.layers import register_notrace_function
from torch import Tensor

ScanOrder = Literal["spatial_first", "temporal_first", "spatiotemporal_v1", "spatiotemporal_v2"]
SCAN_ORDERS = get_args(ScanOrder)


@register_notrace_function
def spatiotemporal_paths(
    num_tubelets: int, num_patches: int, num_prefix_tokens: int, both: bool, device: torch.device
) -> Tensor:
    """Return the tokens' indices in the order of each scan, (2, l), or (4, l) if `both`.

    The tokens of the sequence are in spatial-first order: prefix tokens, all patches of the first tubelet, all of the
    second. Temporal-first order is all times of the first patch, then of the second.

    Args:
        both: False returns spatial-first for the forward direction and temporal-first for the backward one; True
            returns each order for both directions: spatial-first twice, then temporal-first twice.
    """
    l = num_prefix_tokens + num_tubelets * num_patches
    spatial = torch.arange(l, device=device)
    patches = spatial[num_prefix_tokens:].view(num_tubelets, num_patches)
    temporal = torch.cat([spatial[:num_prefix_tokens], patches.t().flatten()])
    return torch.stack([spatial, spatial, temporal, temporal] if both else [spatial, temporal])


def padding_last(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Move the padding of sequences (b, l, d) to their ends and set it to zero, as it may hold anything.

    Args:
        mask: (b, l), False for padding.

    Returns:
        the sequences, with their other tokens in the same order, and their mask.
    """
    order = (~mask).int().argsort(dim=1, stable=True)
    x = x.masked_fill(~mask.unsqueeze(-1), 0).gather(1, order.unsqueeze(-1).expand_as(x))
    return x, mask.gather(1, order)


def paths_of_padded(paths: Tensor, mask: Tensor) -> Tensor:
    """Return paths (k, l) for each of b sequences, (b, k, l), with the padding of its mask (b, l) at their ends."""
    order = (~mask).int()[:, paths].argsort(dim=2, stable=True)
    return paths.expand_as(order).gather(2, order)


def to_paths(h: Tensor, paths: Tensor, c: int) -> Tensor:
    """Return tokens (b, l, d) in the orders of paths (k, l) or (b, k, l), as c directions: (b k / c, c, l, d).

    A direction's second scan is a second image.
    """
    b, l, d = h.shape
    paths = paths.expand(b, -1, -1)
    return h[torch.arange(b, device=h.device).view(b, 1, 1), paths].reshape(-1, c, l, d)


def from_paths(y: Tensor, paths: Tensor, b: int) -> Tensor:
    """Undo :func:`to_paths` for each scan of b images: return (b, k, l, d)."""
    back = paths.expand(b, -1, -1).argsort(dim=2).unsqueeze(-1)  # (b, k, l, 1)
    y = y.reshape(b, back.shape[1], y.shape[2], y.shape[3])
    return y.gather(2, back.expand_as(y))


def cross_scan(by_rows: Tensor, by_columns: Tensor) -> Tensor:
    """Flatten two maps (b, rows, columns, d) to sequences, concatenated along the channels: (b, l, 2d).

    The first map is read row by row, the second column by column. A backward scan reads both from their ends.
    """
    return torch.cat([by_rows.flatten(1, 2), by_columns.transpose(1, 2).flatten(1, 2)], dim=-1)


def cross_merge(sequences: Tensor, rows: int, columns: int) -> Tensor:
    """Undo :func:`cross_scan` and sum the two maps: (b, l, 2d) to (b, rows, columns, d)."""
    by_rows, by_columns = sequences.chunk(2, dim=-1)
    return by_rows.unflatten(1, (rows, columns)) + by_columns.unflatten(1, (columns, rows)).transpose(1, 2)
