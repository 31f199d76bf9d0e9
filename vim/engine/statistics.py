"""The running statistics of batch norms: state that a forward pass in training changes."""

from accelerate.utils import broadcast
from torch import Tensor, nn


def running_statistics(model: nn.Module) -> list[Tensor]:
    """Return the buffers of a model's batch norms: means, variances and counters."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._NormBase)]
    return [buffer for norm in norms for buffer in norm.buffers()]


def share_statistics(model: nn.Module) -> None:
    """Give every process the running statistics of the main one, which are those that are saved.

    Each process has normalised batches of its own.
    """
    for buffer in running_statistics(model):
        buffer.copy_(broadcast(buffer))
