"""How a scan becomes an op: one that is opaque to autograd, autocast, torch.compile, torch.export and TorchScript.

`torch.ops.vim.NAME` takes the tensors of the scan's `Inputs`, each with its k directions, and its `Options` by keyword.
`NAME_forward` also returns what `NAME_backward` needs. The first tensor, (b, k, l, ...), holds the values to scan. The
state has n numbers for each number of a token.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import autograd
from .backends import choose_backend, implementation
from .directions import empty_gradient, empty_like_tokens, tokens_contiguous

LIBRARY = torch.library.Library("vim", "FRAGMENT")


class Scan:
    """A scan's functions as PyTorch calls them. To make one registers its ops.

    PyTorch gives the tensors by position, but for the last ones that are None, and by keyword the options that are not
    at their default.
    """

    def __init__(
        self,
        name: str,
        folder: str,
        schema: str,
        inputs: Callable[..., Any],
        options: Callable[..., Any],
        check: Callable[[Any, Any], None],
        low: Sequence[str],
    ) -> None:
        """Register the ops.

        Args:
            name: of the op, and of its function in each backend.
            folder: holds the backends.
            schema: the op's arguments, the fields of `inputs` and by keyword those of `options`. `reverse` holds
                integers, since torch.jit.trace knows no lists of bool.
            inputs: the named tuple of the tensors.
            options: the named tuple of the options.
            check: raises ValueError if a tensor or an option is not what the scan takes.
            low: the tensors that autocast rounds. The state, and what it is made of, stays float32.
        """
        self.name, self.folder, self.inputs, self.options, self.check, self.low = (
            *(name, folder, inputs, options, check, low),
        )
        gradients = ", ".join(["Tensor"] * schema.count("Tensor"))
        self._define(name, f"({schema}) -> (Tensor y, Tensor last_state)", self.infer, self.infer_fake)
        self._define(
            f"{name}_forward",
            f"({schema}, bool save=False) -> (Tensor y, Tensor last_state, Tensor ungated, Tensor saved)",
            self.forward,
            self.forward_fake,
        )
        self._define(
            f"{name}_backward",
            f"(Tensor grad_y, Tensor? grad_state, Tensor ungated, Tensor saved, {schema}) -> ({gradients})",
            self.backward,
            self.backward_fake,
        )
        for key in ("AutocastCPU", "AutocastCUDA"):
            LIBRARY.impl(name, self.autocast, key)
        ops = torch.ops.vim
        self.op, self.backward_op = getattr(ops, name), getattr(ops, f"{name}_backward")
        forward = getattr(ops, f"{name}_forward").default
        autograd.register(LIBRARY, name, autograd.Op(forward, self.differentiate, self.reference, outputs=2))
        autograd.register_vmap(LIBRARY, f"{name}_forward")
        autograd.register_backward(LIBRARY, f"{name}_backward")

    def _define(self, name: str, signature: str, run: Callable[..., object], fake: Callable[..., object]) -> None:
        LIBRARY.define(name + signature)
        LIBRARY.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"vim::{name}", fake, lib=LIBRARY)

    def named(self, tensors: Sequence[Tensor | None], options: Mapping[str, object]) -> tuple[Any, Any]:
        """Return the tensors and the options by name, checked."""
        inputs, chosen = self.inputs(*tensors), self.options(**options)
        self.check(inputs, chosen)
        return inputs, chosen

    def forward(
        self, *tensors: Tensor | None, save: bool = False, **keywords: object
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        inputs, options = self.named(tensors, keywords)
        backend = choose_backend(options.backend, inputs[0])
        run = getattr(implementation(self.folder, backend), self.name)
        if backend in ("cpu", "triton"):
            y, state, ungated, saved = run(inputs, options, save=save)
        else:
            (y, state), ungated, saved = run(inputs, options), inputs.A.new_empty(0), inputs.A.new_empty(0)
            state = state if options.return_last_state else state.new_empty(0)
        if tokens_contiguous(inputs[0]) and not tokens_contiguous(y):
            y = empty_like_tokens(inputs[0], y.shape, y.dtype).copy_(y)
        return y, state, ungated, saved

    def forward_fake(
        self, *tensors: Tensor | None, save: bool = False, **keywords: object
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        inputs, options = self.named(tensors, keywords)
        values, A = inputs[0], inputs.A
        b, k, l, *sizes = values.shape
        y = empty_like_tokens(values, (b, k if options.combine == "none" else 1, l, *sizes), values.dtype)
        state = A.new_empty((b, k, *sizes, inputs.B.shape[4]) if options.return_last_state else 0)
        backend = choose_backend(options.backend, values)
        if backend in ("cpu", "triton"):
            return y, state, *implementation(self.folder, backend).kept_for_backward(inputs, options, save)
        return y, state, y.new_empty(0), y.new_empty(0)

    def infer(self, *tensors: Tensor | None, **keywords: object) -> tuple[Tensor, Tensor]:
        y, state, _, _ = self.forward(*tensors, **keywords)  # type: ignore[arg-type]
        return y, state

    def infer_fake(self, *tensors: Tensor | None, **keywords: object) -> tuple[Tensor, Tensor]:
        y, state, _, _ = self.forward_fake(*tensors, **keywords)  # type: ignore[arg-type]
        return y, state

    def backward(
        self,
        grad_y: Tensor,
        grad_state: Tensor | None,
        ungated: Tensor,
        saved: Tensor,
        *tensors: Tensor | None,
        **keywords: object,
    ) -> tuple[Tensor, ...]:
        inputs, options = self.inputs(*tensors), self.options(**keywords)
        grad_state = grad_state if options.return_last_state else None
        backend = choose_backend(options.backend, inputs[0])
        run = getattr(implementation(self.folder, backend), f"{self.name}_backward")
        kept = (ungated, saved) if backend in ("cpu", "triton") else ()
        grads = run(grad_y, grad_state, *kept, inputs, options)
        return tuple(
            grad_y.new_empty(0) if tensor is None else _like_grad(grad, tensor)
            for grad, tensor in zip(grads, inputs, strict=True)
        )

    def backward_fake(
        self,
        grad_y: Tensor,
        grad_state: Tensor | None,
        ungated: Tensor,
        saved: Tensor,
        *tensors: Tensor | None,
        **keywords: object,
    ) -> tuple[Tensor, ...]:
        return tuple(
            grad_y.new_empty(0)
            if tensor is None
            else empty_gradient(tensor, tensor.dtype)
            if tensor.dim() >= 4
            else tensor.new_empty(tensor.shape)
            for tensor in self.inputs(*tensors)
        )

    def differentiate(
        self,
        grads: Sequence[Tensor],
        kept: Sequence[Tensor],
        tensors: Sequence[Tensor | None],
        options: Mapping[str, object],
    ) -> tuple[Tensor, ...]:
        return self.backward_op(*grads, *kept, *self.inputs(*tensors), **options)

    def reference(self, *tensors: Tensor | None, **keywords: object) -> tuple[Tensor, Tensor]:
        inputs, options = self.named(tensors, keywords)
        choose_backend(options.backend, inputs[0])
        y, state = getattr(implementation(self.folder, "reference"), self.name)(inputs, options)
        return y, state if options.return_last_state else state.new_empty(0)

    def autocast(self, *tensors: Tensor | None, **keywords: object) -> tuple[Tensor, Tensor]:
        inputs = self.inputs(*tensors)
        device = inputs[0].device.type
        low = torch.get_autocast_dtype(device)
        cast = {
            name: t if t is None or t.dtype == torch.float64 else t.to(low if name in self.low else torch.float32)
            for name, t in inputs._asdict().items()
        }
        with torch.autocast(device, enabled=False):
            return self.op(**cast, **keywords)


def _like_grad(grad: Tensor, tensor: Tensor) -> Tensor:
    """Return a gradient in its tensor's dtype and in the layout that the fake kernel promises."""
    if tensor.dim() < 4:
        return grad.to(tensor.dtype).contiguous()
    out = empty_gradient(tensor, tensor.dtype)
    return grad if grad.dtype == out.dtype and grad.stride() == out.stride() else out.copy_(grad)
