"""Layer-wise relevance propagation for Mamba: the rules under which relevance is input times gradient.

Source: https://arxiv.org/abs/2406.07592 (MambaLRP); of attention, https://arxiv.org/abs/2202.07304. The rules make
every layer linear in what it propagates, by holding constant the factors that depend on the input as well. The
relevance of all tokens then sums to the score, but for what biases add.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

import vim.kernels  # noqa: F401  registers the ops


class RelevanceRules(TorchFunctionMode):
    """Inside this context, a model in evaluation mode has the same outputs, and the gradients of the rules.

    - activation: `x f(x)` has `f(x)` held constant
    - norm: the deviation that it divides by is held constant
    - scan: its steps, B and C are held constant, so that it is linear in its values; so is any softplus, which makes
      steps
    - attention: its weights are held constant
    - product of two activations, as a gate makes: each gets half of the relevance

    They hold for the functions that a model calls, and so for every family, and for models of timm. No parameter may
    require a gradient, since a product with a parameter is a linear layer.
    """

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call a function by its rule, if it has one. The functions that a rule calls have none."""
        rule = RULES.get(function, _as_it_is)
        return rule(function, *args, **(kwargs or {}))


def _as_it_is(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    return function(*args, **options)


def _activation(function: Callable[..., Tensor], x: Tensor, *args: object, **options: object) -> Tensor:
    y = function(x, *args, **options).detach()
    return x * torch.where(x == 0, 0, y / x).detach()


def _silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x).detach()


def _product(function: Callable[..., Tensor], x: Any, y: Any, **options: object) -> Tensor:
    product = function(x, y, **options)
    if isinstance(x, Tensor) and isinstance(y, Tensor) and x.requires_grad and y.requires_grad:
        return product / 2 + product.detach() / 2
    return product


def _layer_norm(
    function: Callable[..., Tensor],
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    dims = tuple(range(-len(normalized_shape), 0))
    centred = x - x.mean(dims, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(dims, keepdim=True) + eps).detach()
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _rms_norm(function: Callable[..., Tensor], x: Tensor, weight: Tensor, *, eps: float = 1e-5) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps).detach() * weight


def _batch_norm(
    function: Callable[..., Tensor],
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor,
    bias: Tensor,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    # linear already; PyTorch's own gradient is wrong for a batch of one whose gradient is a view of another layout
    shape = (1, -1, *[1] * (x.dim() - 2))
    scale = weight * torch.rsqrt(variance + eps)
    return x * scale.view(shape) + (bias - mean * scale).view(shape)


def _attention(function: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, *args: Any, **options: Any) -> Tensor:
    return function(q.detach(), k.detach(), v, *args, **options)


def _constant(function: Callable[..., Tensor], x: Tensor, *args: Any, **options: Any) -> Tensor:
    return function(x.detach(), *args, **options)


def _convolution(function: Callable[..., Tensor], *args: Any, silu: bool = True, **options: Any) -> Tensor:
    y = function(*args, silu=False, **options)
    return _silu(y) if silu else y


def _scan(
    function: Callable[..., tuple[Tensor, Tensor]],
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    y, state = function(x, dt.detach(), A, B.detach(), C.detach(), D=D, **options)
    return y if z is None else _product(torch.mul, y, _silu(z)), state


RULES: dict[Callable[..., Any], Callable[..., Any]] = {
    F.silu: lambda function, x, inplace=False: _silu(x),
    **dict.fromkeys((F.gelu, F.hardswish, F.mish, torch.tanh, Tensor.tanh), _activation),
    **dict.fromkeys((torch.mul, Tensor.mul, torch.matmul, Tensor.matmul, torch.bmm, Tensor.bmm), _product),
    F.layer_norm: _layer_norm,
    F.batch_norm: _batch_norm,
    F.scaled_dot_product_attention: _attention,
    **dict.fromkeys((F.softmax, torch.softmax, Tensor.softmax, F.softplus), _constant),
    torch.ops.vim.rms_norm: _rms_norm,
    torch.ops.vim.causal_conv1d: _convolution,
    **dict.fromkeys((torch.ops.vim.selective_scan, torch.ops.vim.ssd), _scan),
}
