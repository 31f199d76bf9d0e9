"""What timm asks of every model: a classifier, pooling, sizes, pruning, feature maps, weights from a file.

This is the only file that imports private names of timm's models. If a release of timm changes one, a test in
tests/layers/test_contract.py fails under that name.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from timm.layers import get_device_dtype, trunc_normal_
from timm.models._features import FeatureGetterNet, feature_take_indices
from timm.models._input import update_model_args, update_model_input_size
from torch import Tensor, nn

from vim.checkpoints import TagFacts, load_pretrained

from .checks import check_counts
from .factory import Factory

__all__ = [
    "POOLS",
    "FeatureGetter",
    "TimmModel",
    "feature_take_indices",
    "update_model_args",
    "update_model_input_size",
]

POOLS = ("", "token", "avg", "max", "avgmax")


class FeatureGetter(FeatureGetterNet):
    """timm's wrapper for `features_only=True`, with the model's gradient checkpointing and exemptions from decay."""

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade compute for memory in training; see :meth:`TimmModel.set_grad_checkpointing`."""
        self.model.set_grad_checkpointing(enable)  # type: ignore[operator]

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The names of the parameters that weight decay must leave alone."""
        return {f"model.{name}" for name in self.model.no_weight_decay()}  # type: ignore[operator]


class TimmModel(nn.Module):
    """A backbone with a final norm, `norm_f`, and a linear `head`.

    A subclass sets `feature_info` and `norm_f`, calls :meth:`_add_head` last, and defines `img_size`,
    `forward_features` and `pool`, and timm's `forward_intermediates`, `set_input_size` and `group_matcher`.

    Args:
        in_chans: channels of the images.
        num_classes: outputs of the head; 0 for no head.
        num_features: channels of the features before the head.
        num_prefix_tokens: class tokens of the model.
        global_pool: one of :data:`POOLS`; "token" needs a class token.
        not_decayed: last parts of the names of the parameters that weight decay must leave alone.
    """

    blocks = "layers"  # the attribute that holds the blocks whose outputs are feature maps
    out_indices: int | tuple[int, ...] = 3  # of these blocks, for `features_only=True`; an int for the last ones
    published_compute: Literal["projections", "scans", "layers", "images"] = "projections"  # see vim.measure.Counts

    def __init__(
        self,
        *,
        in_chans: int,
        num_classes: int,
        num_features: int,
        num_prefix_tokens: int = 0,
        global_pool: str,
        not_decayed: tuple[str, ...],
    ) -> None:
        check_counts(in_chans=in_chans, num_features=num_features)
        super().__init__()
        self.in_chans, self.num_classes, self.num_prefix_tokens = in_chans, num_classes, num_prefix_tokens
        self.not_decayed = not_decayed
        self.feature_info: list[dict[str, str | int]] = []
        self.pretrained_cfg: TagFacts = {}  # timm's builder sets both
        self.pretrained_model_args: dict[str, object] = {}
        self._set_width(num_features)
        self._set_pool(global_pool)

    @property
    def img_size(self) -> tuple[int, int]:
        """Height and width in pixels of the images to prepare."""
        raise NotImplementedError

    @property
    def num_frames(self) -> int | None:
        """Frames of a clip; None for a model of images."""
        return None

    @property
    def head_hidden_size(self) -> int:
        """Channels of the features before the head."""
        return self.num_features

    # The classifier

    def _add_head(self, drop_rate: float, dd: Factory) -> None:
        """Add dropout and the head, after all other modules: initial weights are drawn in this order."""
        self.head_drop = nn.Dropout(drop_rate)
        self.head = self._make_head(dd)

    def _make_head(self, dd: Factory) -> nn.Module:
        check_counts(least=0, num_classes=self.num_classes)
        return nn.Linear(self.head_hidden_size, self.num_classes, **dd) if self.num_classes > 0 else nn.Identity()

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a new one for `num_classes`, 0 for none, and the pooling unless `global_pool` is None."""
        if global_pool is not None:
            self._set_pool(global_pool)
        self.num_classes = num_classes
        self.head = self._make_head(get_device_dtype(self))
        self.head.train(self.training)

    def _set_pool(self, global_pool: str) -> None:
        assert global_pool in POOLS, f"global_pool must be one of {POOLS}, got {global_pool!r}"
        assert global_pool != "token" or self.num_prefix_tokens, "global_pool='token' needs a class token"
        self.global_pool = global_pool

    def _set_width(self, num_features: int) -> None:
        self.num_features = self.embed_dim = num_features  # timm's two names

    def forward_features(self, image: Tensor) -> Tensor:
        """Map the input to normed features."""
        raise NotImplementedError

    def pool(self, x: Tensor) -> Tensor:
        """Map normed features to (b, num_features), or to themselves for `global_pool` ""."""
        raise NotImplementedError

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map normed features to logits (b, num_classes), or to the pooled features before the head."""
        x = self.head_drop(self.pool(x))
        return x if pre_logits else self.head(x)

    def forward(self, image: Tensor) -> Tensor:
        """Map the input to logits (b, num_classes)."""
        return self.forward_head(self.forward_features(image))

    @torch.jit.ignore
    def tokens_to_map(self, tokens: Tensor, input_size: int | Sequence[int] | None = None) -> Tensor:
        """Map the tokens of a block, or of any module in between, to a map, without class tokens.

        Args:
            tokens: (b, l, d) in the order of the sequence, or a map (b, rows, columns, d), or what the layers of a
                stage take and return, also where they run on windows or are dilated, or what
                :meth:`forward_features` returns.
            input_size: height and width of the images in pixels, or one number for both, after the frames of clips; the
                default is the size that the model is built for.

        Returns:
            (b, d, rows, columns), or of clips (b, d, t, rows, columns).

        Raises:
            ValueError: there are not as many tokens as in such a map.
        """
        raise NotImplementedError

    # Training

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Draw the initial weights.

        Args:
            needs_reset: also re-initialise the layers, which draw their own weights when they are constructed.
        """
        if needs_reset:
            for module in reversed(list(self.modules())):  # a mixer after its parts, which it rescales
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()  # type: ignore[operator]
        self._init_embedding()
        if isinstance(self.head, nn.Linear):
            trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    def _init_embedding(self) -> None:
        """Draw the parameters in front of the blocks; by default they keep what their layers drew."""

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The names of the parameters that weight decay must leave alone."""
        slow = {id(p) for m in self.modules() for p in getattr(m, "lti_parameters", dict)().values()}
        return {n for n, p in self.named_parameters() if n.rpartition(".")[2] in self.not_decayed or id(p) in slow}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """In training keep only the inputs of each block, and compute the rest again in the backward pass."""
        for module in self.modules():
            if hasattr(module, "grad_checkpointing"):
                module.grad_checkpointing = enable  # type: ignore[assignment]

    # Features

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the blocks after the last one wanted, and what no longer fits: a norm and a head of another width.

        Args:
            indices: of the blocks wanted; the last n for an int.
            prune_norm, prune_head: drop the norm, the head in any case.

        Returns:
            the indices, counted from the first block.
        """
        blocks = getattr(self, self.blocks)
        take_indices, last = feature_take_indices(len(blocks), indices)
        setattr(self, self.blocks, blocks[: last + 1])
        width = int(self.feature_info[last]["num_chs"])
        if prune_norm or width != self.num_features:
            self.norm_f: nn.Module = nn.Identity()
        if prune_head or width != self.num_features:
            self._set_width(width)
            self.reset_classifier(0, "")
        return take_indices

    # Weights from a file

    @torch.jit.ignore
    def load_pretrained(self, path: str) -> None:
        """Load a published checkpoint from a file; see :func:`vim.checkpoints.load_pretrained`."""
        load_pretrained(self, path)

    def rename_weights(self, weights: dict[str, object]) -> dict[str, object]:
        """Give published weights the names of this model's, and drop those that it does not use.

        A family overrides this for its own published files. Applied to its own result, it changes nothing.
        """
        return weights

    def adapt_weights(self, weights: dict[str, Tensor], img_size: tuple[int, int]) -> None:
        """Fit weights under this model's names to its input, in place. Tensors of unexpected shapes stay as they are.

        Args:
            img_size: height and width in pixels of the images that the weights were trained on.
        """
