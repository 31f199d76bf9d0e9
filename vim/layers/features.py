"""Feature maps of a model's blocks."""

from timm.models._features import FeatureGetterNet


class FeatureGetter(FeatureGetterNet):
    """timm's wrapper for `features_only=True`, which can save memory in training as the model can."""

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only what goes in and out of each block, and compute the rest again in the backward pass."""
        self.model.set_grad_checkpointing(enable)  # type: ignore[operator]
