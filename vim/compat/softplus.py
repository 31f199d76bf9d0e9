"""`mamba_ssm.ops.triton.softplus`, which Triton kernels of published repositories call."""

import triton
import triton.language as tl


@triton.jit
def softplus(x):  # type: ignore[no-untyped-def]
    """Return log(1 + exp(x)), and above 20 x itself, where exp(x) is too large."""
    return tl.where(x <= 20.0, tl.log(1 + tl.exp(x)), x)
