"""Whether Triton's kernels run on this machine: on a GPU, or else in Triton's interpreter."""

import numpy as np
import pytest
import torch
import triton


def runs_loops():
    """Whether they run here at all: the interpreter of Triton 3.6 does not run a loop with NumPy 2.4."""
    new_triton, new_numpy = (tuple(map(int, v.split(".")[:2])) for v in (triton.__version__, np.__version__))
    return torch.cuda.is_available() or new_triton >= (3, 7) or new_numpy < (2, 4)


needs_loops = pytest.mark.skipif(not runs_loops(), reason="Triton's interpreter needs an older NumPy")
