"""What a model sees: its hidden attention, and maps of what its prediction rests on."""

from .attention import implicit_attention

__all__ = ["implicit_attention"]
