"""Vision Mamba models for timm: `import timm, vim; timm.create_model("vim_small")`."""

from vim import models
from vim._version import __version__

__all__ = ["__version__", "models"]
