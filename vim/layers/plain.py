"""Layers whose parameters an op may take, because a call of them would do nothing else."""

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

Plain = nn.Linear | nn.Conv1d


def stack_plain(*directions: Plain | None) -> tuple[Tensor, Tensor] | None:
    """Return the weights and the biases of one layer for each direction, (c, ...) each; None if one must be called.

    Adapters, quantized and parametrized layers, and those with hooks or a `forward` of their own must be called. A
    direction that is None has no layer.
    """
    layers = [layer for layer in directions if layer is not None]
    if not all(map(_is_plain, layers)) or _has_any_global_hook():
        return None
    return torch.stack([layer.weight for layer in layers]), torch.stack([layer.bias for layer in layers])  # type: ignore[misc]


def _is_plain(layer: nn.Module) -> bool:
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return (
        type(layer) in (nn.Linear, nn.Conv1d)
        and not any(hooks)
        and "forward" not in layer.__dict__
        and not is_traceable_wrapper_subclass(layer.weight)
    )
