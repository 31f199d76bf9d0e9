"""What a model sees: its hidden attention, and maps of what its prediction rests on."""

from .attention import implicit_attention
from .maps import METHODS, Method, explain

__all__ = ["METHODS", "Method", "explain", "implicit_attention"]
