"""The families, one file each. Importing this package registers every model with timm."""

if __name__ != "vim.models":  # under another name every model would be registered twice
    raise ImportError(f"import vim.models, not {__name__}: the folder is installed as vim.models")

from .convnext_s4nd import ConvNeXtS4ND
from .mambamixer import ViM2
from .mambar import MambaR
from .mambavision import MambaVision
from .s4nd import ViTS4ND
from .tsm2 import TSM2
from .videomamba import VideoMamba
from .vim import Vim
from .vmamba import VMamba
from .vssd import VSSD

__all__ = ["VSSD", "ConvNeXtS4ND", "MambaR", "MambaVision", "TSM2", "ViTS4ND", "ViM2", "VideoMamba", "VMamba", "Vim"]
