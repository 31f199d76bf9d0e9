"""The hidden attention of a model's layers: what each token takes from each other token.

Source: https://arxiv.org/abs/2403.01590; with convolution and gate, https://arxiv.org/abs/2405.16504.
Sizes: b images, l tokens, d channels.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vim.errors import UserError
from vim.layers import MambaMixer, check_choice

from . import matrices
from .frozen import frozen
from .recording import Recorded, Run, parts, recorded, runs

Direction = Literal["both", "forward", "backward"]
Reduce = Literal["mean", "none"]


def implicit_attention(
    model: nn.Module,
    images: Tensor,
    layers: Sequence[int] | None = None,
    direction: Direction = "both",
    reduce: Reduce = "mean",
    include_D: bool = False,
    include_conv_gate: bool = False,
) -> list[Tensor]:
    """Return the hidden attention of each layer, exact for the given images.

    Row i of a matrix tells how much of each token j is in what the layer's scan returns for token i. Entries may be
    negative, and rows do not sum to 1. Tokens have their order in the model's sequence, with class tokens in their
    places; those of a map go row by row.

    Args:
        images: (b, c, h, w), or (b, c, t, h, w) for a video model.
        layers: indices of the layers that scan, also from the end; None for all.
        direction: "forward" and "backward" leave out the scans of the other direction; a mean of both directions is
            still divided by two.
        reduce: "mean" over the channels, or "none" for the matrix of every channel: l x l numbers for each. The
            channels of a head of Mamba-2 have one matrix: d is then the number of heads.
        include_D: add the skip connection of the scan.
        include_conv_gate: from the input of the convolution to the output of the gate. It implies the skip connection.

    Returns:
        for each layer (b, l, l), or (b, d, l, l) for `reduce` "none".

    Raises:
        UserError: the model has no scans of tokens, no such layer, or no causal convolution and gate.
        ValueError: there is no such direction, or nothing to reduce to.
    """
    check_choice("direction", direction, get_args(Direction))
    check_choice("reduce", reduce, get_args(Reduce))
    with frozen(model), torch.no_grad():
        with recorded(model, layers) as found:
            model(images)
        return [layer_attention(one, direction, reduce, include_D, include_conv_gate) for one in found]


def layer_attention(
    one: Recorded, direction: Direction, reduce: Reduce, include_D: bool, include_conv_gate: bool
) -> Tensor:
    """Return the matrix of one layer; see :func:`implicit_attention`."""
    if include_conv_gate and one.convolution is None:
        raise UserError(
            "include_conv_gate needs Mamba's own convolution and gate of each channel, which this "
            f"{type(one.mixer).__name__} lacks or has wrapped: leave it out"
        )
    found = runs(one)
    steps = found[0].selected.dt
    b, l, d = steps.shape
    matrix = steps.new_zeros((b, l, l) if reduce == "mean" else (b, d, l, l))
    for run in found:
        if _is_of(direction, run.reverse):
            matrix += _of_run(one, run, reduce, include_D, include_conv_gate)
    return matrix / len(found) if getattr(one.mixer, "combine", "sum") == "mean" else matrix


def _is_of(direction: Direction, reverse: bool) -> bool:
    return direction == "both" or (direction == "backward") == reverse


def token_attention(one: Recorded, weights: Tensor, direction: Direction = "both") -> Tensor:
    """Return the weighted sum of a layer's rows for every channel, in time and memory linear in the tokens.

    It is the gradient of the scan, which is linear in its values.

    Args:
        weights: (b, l), of the rows: 1 for a class token and 0 for all others returns the class token's row.
        direction: see :func:`implicit_attention`.

    Returns:
        (b, l, d).
    """
    assert one.scan is not None
    inputs, options = one.scan
    values = inputs.u.detach().requires_grad_()
    inputs = inputs._replace(u=values, D=None, z=None)
    with torch.enable_grad():
        y, _ = torch.ops.vim.selective_scan(*inputs, **options._replace(combine="none")._asdict())
    rows = torch.zeros_like(y)
    for part in parts(one):
        if not _is_of(direction, bool(options.reverse[part.direction])):
            continue
        rows[part.images, part.direction, :, part.channels] = weights[:, part.path].unsqueeze(-1).to(y.dtype)
    (gradient,) = torch.autograd.grad(y, values, rows)
    total = torch.zeros((), device=y.device)
    for part in parts(one):
        total = total + gradient[part.images, part.direction, :, part.channels][:, part.path.argsort()]
    return total / len(parts(one)) if getattr(one.mixer, "combine", "sum") == "mean" else total


def _of_run(one: Recorded, run: Run, reduce: Reduce, include_D: bool, include_conv_gate: bool) -> Tensor:
    """Return the matrix of a run, its tokens in the order of the model's sequence."""
    back = run.part.path.argsort()
    if not include_conv_gate:
        ones = torch.ones_like(run.selected.dt)
        return _along_path(run, ones, ones, reduce, include_D)[..., back, :][..., back]

    # a column for each token that the convolution sees: one matrix a tap
    assert isinstance(one.mixer, MambaMixer) and one.convolution is not None and one.gate is not None
    x, taps, bias = one.convolution  # (b, k, l, d), (k, d, w), (k, d)
    k, width = run.part.direction % taps.shape[0], taps.shape[2]
    before = torch.ops.vim.causal_conv1d(x, taps, bias, reverse=one.mixer.convolved, silu=False)
    before = before[run.part.images, k].to(run.selected.dt.dtype)
    gate = F.silu(one.gate[:, run.part.path]).to(before.dtype)
    matrix = torch.zeros((), device=before.device)
    for tap in range(width):
        weights = _along_path(run, gate, torch.sigmoid(before) * taps[k, :, tap].to(before.dtype), reduce, True)
        shift = width - 1 - tap
        if one.mixer.convolved[k]:
            matrix = matrix + F.pad(weights, (shift, 0))[..., : weights.shape[-1]]
        else:
            matrix = matrix + F.pad(weights, (0, shift))[..., shift:]
    return matrix[..., back, :][..., back]


def _along_path(run: Run, queries: Tensor, keys: Tensor, reduce: Reduce, include_D: bool) -> Tensor:
    """Return ``queries[i] (M[i, j] + D) keys[j]``, its tokens in the order of the run's path."""
    if run.reverse:
        queries, keys = queries.flip(1), keys.flip(1)
    skip = (queries * keys * run.selected.D).transpose(1, 2)  # (b, d, l)
    if reduce == "mean":
        matrix = matrices.sum_of_channels(run.selected, queries, keys) / queries.shape[2]
        skip = skip.mean(1)
    else:
        matrix = matrices.of_channels(run.selected)
        matrix = queries.transpose(1, 2).unsqueeze(-1) * matrix * keys.transpose(1, 2).unsqueeze(-2)
    if include_D:
        matrix = matrix + torch.diag_embed(skip)
    return matrix.flip(-1, -2) if run.reverse else matrix
