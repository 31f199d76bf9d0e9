"""What `import triton` gives where it is not installed: decorators work, and a kernel refuses to be launched.

Published files define Triton kernels when they are imported. Triton has no builds for macOS and Windows.
"""

import functools
from collections.abc import Callable
from types import FunctionType
from typing import NoReturn

CONTENTS = {
    "__version__": "triton_stub.VERSION",
    "cdiv": "triton_stub.cdiv",
    "next_power_of_2": "triton_stub.next_power_of_2",
}
VERSION = "3.0.0"  # published files ask for the names of version 3


def cdiv(x: int, y: int) -> int:
    """Return x / y, rounded up."""
    return -(-x // y)


def next_power_of_2(n: int) -> int:
    """Return the first power of 2 that is at least n."""
    return 1 << (n - 1).bit_length()


class Stub(type):
    """The type of any name of triton: a class, since PyTorch asks whether objects are of it."""

    def __getattr__(cls, name: str) -> "Stub":
        return stub(name)

    def __call__(cls, *args: object, **options: object) -> object:
        """Decorate a function; otherwise return a decorator, or an option."""
        is_decorator = len(args) == 1 and not options and isinstance(args[0], FunctionType | Kernel)
        return Kernel(args[0]) if is_decorator else cls  # type: ignore[arg-type]


def stub(name: str) -> Stub:
    """Return what stands for a name, or raise AttributeError for one of Python's own."""
    if name.startswith("__"):
        raise AttributeError(name)
    return Stub(name, (), {})


class Kernel:
    """A function with triton's decorators."""

    __name__: str

    def __init__(self, function: Callable[..., object]) -> None:
        functools.update_wrapper(self, function)

    def __call__(self, *args: object, **options: object) -> NoReturn:
        """Refuse: raise NotImplementedError."""
        raise NotImplementedError(f"the kernel {self.__name__} needs triton, which is not installed")

    def __getitem__(self, grid: object) -> Callable[..., NoReturn]:
        return self
