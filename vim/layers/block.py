"""A mixer on a float32 residual stream."""

from timm.layers import DropPath
from torch import Tensor, nn

from .mixer import MixerState
from .moe import ExpertBlock
from .norm import RMSNorm


class MambaBlock(nn.Module):
    """``x + drop_path(mixer(norm(x)))``.

    The published code adds the previous block's branch first, then normalises. The sums are the same, and either way
    the branch of block j is dropped at the j-th rate.

    Args:
        moe: experts that follow; None for none. They take neither padding nor a sequence in pieces.
    """

    def __init__(
        self,
        norm: RMSNorm,
        mixer: nn.Module,
        *,
        drop_path: float = 0.0,
        moe: ExpertBlock | None = None,
    ) -> None:
        super().__init__()
        self.norm = norm
        self.mixer = mixer
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.moe = moe

    def forward(self, residual: Tensor, paths: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Map (b, l, d), float32, to the same.

        Args:
            paths, mask: the orders of the scans, and the padding; see :meth:`MambaMixer.forward`.
        """
        assert mask is None or self.moe is None, "experts know no padding"
        x = residual + self.drop_path(self.mixer(self.norm(residual), paths, mask))
        return x if self.moe is None else self.moe(x)

    def step(self, residual: Tensor, state: MixerState | None) -> tuple[Tensor, MixerState]:
        """Map the next tokens of a sequence, (b, l, d), float32, to the same shape; see :meth:`MambaMixer.step`."""
        assert self.moe is None, "experts take all tokens of a sequence at once"
        mixed, state = self.mixer.step(self.norm(residual), state)  # type: ignore[operator]
        return residual + self.drop_path(mixed), state
