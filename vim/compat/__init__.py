"""Run published Mamba repositories as they are: their `mamba_ssm`, `causal_conv1d` and extensions, on our kernels.

`install` serves these import names in this process, from memory. Not affiliated with the authors of those packages.
"""

from .finder import install, served, uninstall

__all__ = ["install", "served", "uninstall"]
