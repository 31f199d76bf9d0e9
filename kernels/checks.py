"""What every op asks of its tensors: shapes, dtypes, devices; and the layout it gives its results."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

MOST_DIRECTIONS = 32  # they travel to the native code as the bits of a number


def check(
    name: str,
    tensor: Tensor | None,
    letters: str,
    sizes: tuple[int, ...],
    dtypes: Sequence[torch.dtype],
    device: torch.device,
) -> None:
    """Raise ValueError unless the tensor, if given, has these sizes, one of these dtypes, and is on this device."""
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


def refuse_to_differentiate_again(ctx: Any, *grads: Any) -> None:
    """The backward formula of an op that is itself a backward pass."""
    raise RuntimeError("vim's kernels can be differentiated once")


def empty_rows(like: Tensor, b: int, k: int, *sizes: int) -> Tensor:
    """An empty (b, k, ...) tensor, in memory one direction after the other: a batched product reads it as it is."""
    return like.new_empty(k, b, *sizes).transpose(0, 1)


def as_rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in the layout of :func:`empty_rows` and that dtype: itself, if it is."""
    out = empty_rows(x.new_empty(0, dtype=dtype), *x.shape)
    return x if x.dtype == dtype and x.stride() == out.stride() else out.copy_(x)


def on_its_device(run: Callable[..., Any]) -> Callable[..., Any]:
    """Have a function launch on the GPU that its first tensor lies on: Triton takes the current one."""

    @functools.wraps(run)
    def launch(first: Tensor, *args: Any, **options: Any) -> Any:
        with torch.cuda.device_of(first):
            return run(first, *args, **options)

    return launch
