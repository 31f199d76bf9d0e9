"""The static type of vision models. timm's models and ours have these attributes; none inherits from the class."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from vim.checkpoints import TagFacts

    class VisionModel(nn.Module):
        """A timm model of images, or one of this package's of clips."""

        in_chans: int
        num_classes: int
        embed_dim: int
        num_features: int
        img_size: tuple[int, int]
        num_frames: int | None
        pos_embed: Tensor
        layers: nn.ModuleList
        pretrained_cfg: Mapping[str, object]

        def forward_features(self, images: Tensor) -> Tensor: ...
        def forward_head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor: ...
        def forward_intermediates(
            self, images: Tensor, *, indices: list[int], norm: bool, intermediates_only: bool
        ) -> list[Tensor]: ...
        def no_weight_decay(self) -> set[str]: ...
        def set_grad_checkpointing(self, enable: bool = True) -> None: ...
        def set_input_size(self, img_size: int | tuple[int, int]) -> None: ...

    class OwnModel(VisionModel):
        """A model of this package, which checkpoints can be loaded into: see :class:`vim.checkpoints.Loadable`."""

        pretrained_cfg: TagFacts
        pretrained_model_args: dict[str, object]
        head_hidden_size: int

        def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None: ...
        def rename_weights(self, weights: dict[str, object]) -> dict[str, object]: ...
        def adapt_weights(self, weights: dict[str, Tensor], img_size: tuple[int, int]) -> None: ...

else:
    VisionModel = OwnModel = nn.Module
