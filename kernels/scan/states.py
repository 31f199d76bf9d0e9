"""The scan with its states after every so many tokens: `torch.ops.vim.selective_scan_with_states`.

The published extensions return these states. Nothing here is differentiated.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import choose_backend, implementation
from ..registration import LIBRARY
from .op import SCAN, SCHEMA
from .reference import Inputs, Options

Scanned = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
EVERY = 2048  # tokens between two states


def longest_run(u: Tensor) -> int:
    """Return how many tokens of u, (b, k, l, d), one call takes: all of them on a CPU, otherwise those of a state."""
    return max(u.shape[2], 1) if choose_backend("auto", u) == "cpu" else EVERY


def _run(*tensors: Tensor | None, save: bool = False, **keywords: object) -> Scanned:
    """Return y, states (b, k, c, d, n), sums of the step sizes so far (b, k, c, d), and what `_forward` keeps.

    With a gate, y before it is kept in any case on a CPU.
    """
    inputs, options = SCAN.named(tensors, keywords)
    if choose_backend(options.backend, inputs.u) == "cpu":
        native = implementation("scan", "cpu")
        return native.selective_scan_with_states(inputs, options, every=EVERY, save=save)
    y, state, ungated, saved = SCAN.forward(*tensors, save=save, **{**keywords, "return_last_state": True})
    return y, state.unsqueeze(2), _sum_of_steps(inputs, options).unsqueeze(2), ungated, saved


def _sum_of_steps(inputs: Inputs, options: Options) -> Tensor:
    dt = inputs.delta.to(inputs.A.dtype)
    dt = dt if inputs.delta_bias is None else dt + inputs.delta_bias.unsqueeze(1)
    return (F.softplus(dt) if options.delta_softplus else dt).sum(2)


def _fake(*tensors: Tensor | None, save: bool = False, **keywords: object) -> Scanned:
    inputs, options = SCAN.named(tensors, keywords)
    y, _, ungated, saved = SCAN.forward_fake(*tensors, save=save, **keywords)
    if choose_backend(options.backend, inputs.u) == "cpu":
        ungated = implementation("scan", "cpu").empty_ungated(inputs, options)
    b, k, l, d = inputs.u.shape
    states = inputs.A.new_empty(b, k, max(-(-l // EVERY), 1), d, inputs.A.shape[2])
    return y, states, states.new_empty(states.shape[:4]), ungated, saved


LIBRARY.define(
    f"selective_scan_with_states({SCHEMA}, bool save=False) -> "
    "(Tensor y, Tensor states, Tensor elapsed, Tensor ungated, Tensor saved)"
)
LIBRARY.impl("selective_scan_with_states", _run, "CompositeExplicitAutograd")
torch.library.register_fake("vim::selective_scan_with_states", _fake, lib=LIBRARY)
