"""Names that vision repositories import and do not call, most of language models: each raises when it is called."""

from dataclasses import dataclass, field
from typing import NoReturn

from torch import nn


def _refuse(name: str) -> NoReturn:
    raise NotImplementedError(f"vim.compat serves {name} for import only: to call it, install mamba_ssm")


class GenerationMixin:
    """A base class of language models."""

    def generate(self, *args: object, **options: object) -> NoReturn:
        """Raise NotImplementedError."""
        _refuse("GenerationMixin.generate")


@dataclass
class InferenceParams:
    """The state of a model that generates token by token."""

    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0
    batch_size_offset: int = 0
    key_value_memory_dict: dict = field(default_factory=dict)
    lengths_per_sample: object = None


@dataclass
class MambaConfig:
    """The options of a language model."""

    d_model: int = 2560
    d_intermediate: int = 0
    n_layer: int = 64
    vocab_size: int = 50277
    ssm_cfg: dict = field(default_factory=dict)
    attn_layer_idx: list = field(default_factory=list)
    attn_cfg: dict = field(default_factory=dict)
    rms_norm: bool = True
    residual_in_fp32: bool = True
    fused_add_norm: bool = True
    pad_vocab_size_multiple: int = 8
    tie_embeddings: bool = True


class _Refused(nn.Module):
    def __init__(self, *args: object, **options: object) -> None:
        _refuse(type(self).__name__)


class MambaLMHeadModel(_Refused):
    """A language model; raises NotImplementedError."""


class MixerModel(_Refused):
    """A language model without its head; raises NotImplementedError."""


class MHA(_Refused):
    """Attention of hybrid models; raises NotImplementedError."""


class Mamba3(_Refused):
    """The mixer of mamba_ssm 2.3; raises NotImplementedError."""


class ColumnParallelLinear(_Refused):
    """A linear layer on several devices; raises NotImplementedError."""


class RowParallelLinear(_Refused):
    """A linear layer on several devices; raises NotImplementedError."""


def refused(name: str):  # type: ignore[no-untyped-def]
    """Return a function that refuses to be called; AttributeError for one of Python's own names."""
    if name.startswith("__"):
        raise AttributeError(name)

    def function(*args: object, **options: object) -> NoReturn:
        _refuse(name)

    function.__name__ = function.__qualname__ = name
    return function


load_config_hf, load_state_dict_hf = refused("load_config_hf"), refused("load_state_dict_hf")
all_reduce, reduce_scatter = refused("all_reduce"), refused("reduce_scatter")
chunk_scan_fwd, chunk_scan_bwd = (
    refused("_mamba_chunk_scan_combined_fwd"),
    refused("_mamba_chunk_scan_combined_bwd"),
)
decode = refused("decode")
norm_fwd, norm_bwd = refused("_layer_norm_fwd"), refused("_layer_norm_bwd")
