"""What a forward pass computes, counted on the meta device: no weights, no data, no time.

PyTorch's counter knows matrix products, convolutions and attention, and takes an op of ours for nothing;
:data:`FORMULAS` makes up for it. With them it works on its own too::

    with FlopCounterMode(custom_mapping=FORMULAS) as counter:
        model(image)

Only forward passes: there is no accepted count of the scan's backward pass, and :data:`FORMULAS` has no op's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import vim  # noqa: F401  registers the ops


def _scan_flops(u: Sequence[int], delta: Sequence[int], A: Sequence[int], *others: Any, **options: Any) -> int:
    """9 b k l d n, for u (b, k, l, d) and A (k, d, n).

    The estimate of Mamba's author, https://github.com/state-spaces/mamba/issues/110. D and the gate are not in it.
    """
    b, k, l, d = u
    return 9 * b * k * l * d * A[-1]


def _conv_flops(x: Sequence[int], weight: Sequence[int], *others: Any, **options: Any) -> int:
    """2 b k l d w, for x (b, k, l, d) and w taps; as PyTorch counts convolutions, which is without bias and SiLU."""
    b, k, l, d = x
    return 2 * b * k * l * d * weight[-1]


# a formula a name of the scan: inference mode shows the op to the counter, autograd what it calls; never both
_SCANS = {torch.ops.vim.selective_scan: _scan_flops, torch.ops.vim.selective_scan_forward: _scan_flops}
FORMULAS: dict[Any, Callable[..., int]] = {**_SCANS, torch.ops.vim.causal_conv1d: _conv_flops}


@dataclass(frozen=True)
class Counts:
    """The compute of one forward pass, by convention. Norms, activations, gates and sums count nowhere.

    Attributes:
        published_macs: multiply-adds of matrix products and convolutions, but for those that Mamba's fused kernel does
            between a mixer's projections in and out. The published figures: fvcore does not see into that kernel
            (https://github.com/OpenGVLab/VideoMamba/issues/18), and calls a multiply-add a FLOP.
        macs: multiply-adds of all matrix products and convolutions.
        scan_flops: FLOPs of the scans, 9 for each image, direction, token, channel and state.
    """

    published_macs: int
    macs: int
    scan_flops: int

    @property
    def flops(self) -> int:
        """Everything counted: 2 for a multiply-add, and the scans."""
        return 2 * self.macs + self.scan_flops


def count(model: nn.Module, input_size: Sequence[int], batch_size: int = 1) -> Counts:
    """Count one forward pass of a model, in the mode it is in, on images of `input_size` (c, h, w).

    The model stays where and as it is; what runs is a stand-in without data. `published_macs` leaves out what a module
    multiplies that itself scans and has an `in_proj` and an `out_proj`, but for these two.

    Raises:
        Exception: what the model raises at images of that size.
    """
    tensors = [*model.named_parameters(), *model.named_buffers()]
    stand_in = {name: tensor.detach().to("meta") for name, tensor in tensors}
    dtype = next((tensor.dtype for tensor in model.parameters()), None)
    image = torch.empty(batch_size, *input_size, dtype=dtype, device="meta")
    with torch.inference_mode(), FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        torch.func.functional_call(model, stand_in, image)
    flops = counter.get_flop_counts()
    everything = flops.get("Global", {})
    products = _products(everything)
    return Counts(
        published_macs=(products - _inside_mixers(flops)) // 2,
        macs=products // 2,
        scan_flops=sum(everything.values()) - products,
    )


def _products(flops: dict[Any, int]) -> int:
    """FLOPs of all but the scans."""
    return sum(number for op, number in flops.items() if op not in _SCANS)


def _inside_mixers(flops: dict[str, dict[Any, int]]) -> int:
    """FLOPs of products, by module, that are between the projections in and out of a module that scans."""
    inside = 0
    for name, own in flops.items():
        projections = [f"{name}.in_proj", f"{name}.out_proj"]
        if _SCANS.keys() & own.keys() and flops.keys() >= set(projections):
            inside += _products(own) - sum(_products(flops[projection]) for projection in projections)
    return inside
