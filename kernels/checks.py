"""What every op checks of its tensors, and how an op without a backward kernel is differentiated."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def check(
    name: str,
    tensor: Tensor | None,
    letters: str,
    sizes: tuple[int, ...],
    dtypes: Sequence[torch.dtype],
    device: torch.device,
) -> None:
    """Raise ValueError unless `tensor` is None or has these sizes, one of these dtypes, and is on this device."""
    if tensor is None:
        return
    if tensor.shape != sizes:
        raise ValueError(f"{name} must be ({letters}) = {sizes}, got {tuple(tensor.shape)}")
    if tensor.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name} must be {names}, got {str(tensor.dtype).removeprefix('torch.')}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device}, got {tensor.device}")


def check_dim(name: str, tensor: Tensor, letters: str) -> None:
    """Raise ValueError unless the tensor has a dimension for each letter and is not empty."""
    if tensor.dim() != letters.count(",") + 1:
        raise ValueError(f"{name} must be ({letters}), got {tuple(tensor.shape)}")
    if 0 in tensor.shape:
        raise ValueError(f"{name} must not be empty, got {tuple(tensor.shape)}")


def differentiate(
    run: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor | None],
    grads_out: Tensor | tuple[Tensor, ...],
) -> list[Tensor | None]:
    """Return the gradients of `inputs` from those of `run(*inputs)`; None for an input that is None.

    Inside an op autograd is off, and only the transforms of torch.func differentiate.
    """

    def run_given(*tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        given = iter(tensors)
        return run(*(None if tensor is None else next(given) for tensor in inputs))

    _, vjp, *_ = torch.func.vjp(run_given, *(tensor for tensor in inputs if tensor is not None))
    grads = iter(vjp(grads_out))
    return [None if tensor is None else next(grads) for tensor in inputs]
