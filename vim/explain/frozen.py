"""A model that holds still while it is explained."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import RLock, get_ident
from typing import Any

import torch
from torch import nn

_ONE_AT_A_TIME = RLock()  # two explanations of one model would undo what the other one changes


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Have a model in evaluation mode, with parameters that are constants; afterwards it is as it was.

    It runs as it is written, whatever surrounds it: not compiled, without autocast, without gradient checkpointing,
    which would compute it again without the rules of relevance, and where gradients can be taken.
    """
    with _ONE_AT_A_TIME:
        modules = list(model.modules())
        training = [module for module in modules if module.training]
        checkpointing = [module for module in modules if getattr(module, "grad_checkpointing", False) is True]
        learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
        device = next((parameter.device.type for parameter in model.parameters()), "cpu")
        try:
            model.eval().requires_grad_(False)
            _set(checkpointing, "grad_checkpointing", False)
            with (
                torch.inference_mode(False),  # it lets gradients be taken within no_grad, too
                torch.autocast(device, enabled=False),
                torch.compiler.set_stance("force_eager"),
            ):
                yield
        finally:
            _set(training, "training", True)
            _set(checkpointing, "grad_checkpointing", True)
            for parameter in learned:
                parameter.requires_grad_()


def _set(modules: list[nn.Module], name: str, value: bool) -> None:
    for module in modules:
        setattr(module, name, value)


def in_this_thread(hook: Callable[..., None]) -> Callable[..., None]:
    """Have a module's hook act in the thread alone in which it is made: others may run the model too."""
    thread = get_ident()

    def guarded(*arguments: Any) -> None:
        if get_ident() == thread:
            hook(*arguments)

    return guarded
