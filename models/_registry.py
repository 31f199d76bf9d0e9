"""How families register with timm: the facts of a tag, the creator of a variant, and its entry in the registry."""

import sys
from collections.abc import Mapping
from typing import Any, TypeVar

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, register_model, resolve_pretrained_cfg

from vim.checkpoints import cannot_download, checkpoint_filter_fn
from vim.layers import FeatureGetter, MambaBackbone, PyramidGetter, TimmModel

Model = TypeVar("Model", bound=TimmModel)
ISOTROPIC = "Vim, VideoMamba and Mamba-R"  # they have one resolution


def tag_facts(**facts: object) -> dict[str, object]:
    """Return the `pretrained_cfg` of a tag, `NAME.TAG`; by default for ImageNet-1k at 224 pixels."""
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        **facts,
    }


def create(
    model_class: type[Model], variant: str, pretrained: bool, options: Mapping[str, Any], **defaults: object
) -> Model:
    """Build a variant of a family, as `timm.create_model` asks for it.

    Args:
        model_class: the family.
        variant: the name without a tag.
        pretrained: load the weights of the tag.
        options: the user's, for the model class or for timm, such as `features_only` or `pretrained_cfg_overlay`.
        defaults: options of the variant, which the user's replace.

    Raises:
        ValueError: `pyramid_channels` or `output_stride` does not fit the model.
        UserError: the weights cannot be downloaded, or are not the model's; see
            :func:`vim.checkpoints.load_pretrained`.
    """
    merged: dict[str, Any] = {**defaults, **options}
    if merged.get("features_only"):  # the weights may have any head: it is not used
        merged.setdefault("num_classes", 0)
    feature_cfg: dict[str, Any] = {"out_indices": model_class.out_indices, "feature_cls": FeatureGetter}
    isotropic = issubclass(model_class, MambaBackbone)
    if isotropic and "output_stride" in merged and "pyramid_channels" not in merged:
        raise ValueError(f"{variant} has one resolution: output_stride needs pyramid_channels and features_only=True")
    if "pyramid_channels" in merged:
        if not merged.get("features_only") or not isotropic:
            raise ValueError(f"pyramid_channels is for features_only=True of {ISOTROPIC}, got it for {variant}")
        merged.setdefault("dynamic_img_size", True)
        feature_cfg = {key: merged.pop(key) for key in ("pyramid_channels", "output_stride") if key in merged}
        feature_cfg |= {"feature_cls": PyramidGetter, "out_indices": 4}
    # timm's own reader would prefer a file's running average over the weights whose accuracy is published
    overlay = {"custom_load": "hf", **(merged.pop("pretrained_cfg_overlay", None) or {})}
    try:
        return build_model_with_cfg(
            model_class,
            variant,
            pretrained,
            pretrained_cfg_overlay=overlay,
            pretrained_filter_fn=checkpoint_filter_fn,
            feature_cfg=feature_cfg,
            **merged,
        )
    except OSError as error:  # urllib's errors and those of the Hub
        cfg = resolve_pretrained_cfg(variant, merged.get("pretrained_cfg"), overlay)
        if cfg.file:
            raise
        raise cannot_download(cfg.to_dict(), error) from error


def register_variant(model_class: type[Model], name: str, doc: str, **defaults: object) -> None:
    """Register a variant as a function of the family's module: importable and picklable, as a function written out.

    Args:
        model_class: the family.
        name: the name without a tag.
        doc: the function's docstring.
        defaults: options of the variant; see :func:`create`.
    """

    def entrypoint(pretrained: bool = False, **options: object) -> Model:
        return create(model_class, name, pretrained, options, **defaults)

    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__module__, entrypoint.__doc__ = model_class.__module__, doc
    setattr(sys.modules[model_class.__module__], name, register_model(entrypoint))
