"""How PyTorch differentiates an op, and maps it over samples: the same for all ops.

In reverse mode, an op and its backward pass are a node of autograd's graph, and `torch.func.vmap` calls either once for
each sample. In forward mode, and where torch.func takes derivatives of derivatives, the reference runs in the op's
place: it is made of PyTorch's operators, which know their derivatives of any order. torch.autograd's own derivatives of
derivatives are refused.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

MaybeTensors = Sequence[Tensor | None]
ONCE = "vim's kernels can be differentiated once: for second derivatives use torch.func.hessian, or jvp of grad"


@dataclass(frozen=True, eq=False)
class Op:
    """What autograd runs of an op. The tensors are the op's, but for the last ones that are None.

    Attributes:
        forward: takes the tensors, `save` and the options; returns the op's outputs, then what its backward pass needs.
        backward: takes the outputs' gradients, what `forward` kept, the tensors and the options; returns the tensors'
            gradients.
        reference: the op, made of PyTorch's operators.
        outputs: how many the op returns.
    """

    forward: Callable[..., tuple[Tensor, ...]]
    backward: Callable[..., MaybeTensors]
    reference: Callable[..., Tensor | tuple[Tensor, ...]]
    outputs: int


class _Node(_SingleLevelFunction):
    """An op in autograd's graph. Inside a transform of torch.func it is in the graph of the innermost one only."""

    @staticmethod
    def forward(ctx: Any, op: Op, options: dict[str, object], *tensors: Tensor | None) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowADInplaceOrView():  # a transposed output is no view: it may be changed in place
            output = op.forward(*tensors, save=True, **options)
        ctx.op, ctx.options = op, options
        ctx.save_for_backward(*output[op.outputs :], *tensors)
        return output[: op.outputs]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        _, _, *needed = ctx.needs_input_grad
        saved = ctx.saved_tensors
        kept = len(saved) - len(needed)
        given = ctx.op.backward(grads, saved[:kept], saved[kept:], ctx.options)
        return None, None, *(grad if needs else None for grad, needs in zip(given, needed, strict=False))


def register(lib: torch.library.Library, name: str, op: Op) -> None:
    """Register how an op of `lib` is differentiated and mapped."""

    def run(*tensors: Tensor | None, **options: object) -> Tensor | tuple[Tensor, ...]:
        transformed = torch._C._are_functorch_transforms_active()
        if _is_dual(tensors) or (transformed and _is_of_higher_order()):
            return op.reference(*tensors, **options)
        output: tuple[Tensor, ...]
        if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
            with enable_single_level_autograd_function() if transformed else nullcontext():
                output = _Node.apply(op, options, *tensors)  # type: ignore[attr-defined]
        else:
            with torch._C._AutoDispatchBelowAutograd():
                output = op.forward(*tensors, save=False, **options)
        return output[0] if op.outputs == 1 else tuple(output[: op.outputs])

    lib.impl(name, run, "Autograd")
    register_vmap(lib, name)


def register_backward(lib: torch.library.Library, name: str) -> None:
    """Register an op that is a backward pass: it is mapped, but not differentiated."""
    overload = getattr(torch.ops.vim, name).default

    def forward(*arguments: Any, save: bool, **options: object) -> tuple[Tensor, ...]:
        return tuple(overload(*arguments, **options))

    def refuse(*arguments: object, **options: object) -> NoReturn:
        raise RuntimeError(ONCE)

    register(lib, name, Op(forward, refuse, refuse, len(overload._schema.returns)))


def register_vmap(lib: torch.library.Library, name: str) -> None:
    """Register that `torch.func.vmap` calls an op of `lib` once for each sample."""
    overload = getattr(torch.ops.vim, name).default

    def run(info: Any, in_dims: tuple[int | None, ...], *tensors: Any, **options: object) -> tuple[Any, int]:
        outputs = []
        for sample in range(info.batch_size):
            chosen = (t if dim is None else t.select(dim, sample) for t, dim in zip(tensors, in_dims, strict=True))
            outputs.append(overload(*chosen, **options))
        if isinstance(outputs[0], Tensor):
            return torch.stack(outputs), 0
        return tuple(torch.stack(each) for each in zip(*outputs, strict=True)), 0

    torch.library.register_vmap(f"vim::{name}", run, lib=lib)


def _is_dual(tensors: MaybeTensors) -> bool:
    """Return whether a tensor has a tangent of `torch.autograd.forward_ad`."""
    if forward_ad._current_level < 0:
        return False
    return any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def _is_of_higher_order() -> bool:
    """Return whether torch.func differentiates in forward mode, or more than once."""
    levels = [level.key() for level in torch._C._functorch.get_interpreter_stack() or ()]
    return TransformType.Jvp in levels or levels.count(TransformType.Grad) > 1
