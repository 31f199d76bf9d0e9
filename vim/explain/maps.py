"""Maps of what a model's prediction rests on, at the resolution of the image.

Sources: raw, rollout and attribution, https://arxiv.org/abs/2403.01590; gradcam, https://arxiv.org/abs/1610.02391; lrp,
https://arxiv.org/abs/2406.07592. Sizes: b images, l tokens, d channels.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vim.errors import UserError, closest
from vim.layers import TimmModel, check_choice

from .attention import Direction, layer_attention, token_attention
from .frozen import frozen, in_this_thread
from .recording import Recorded, recorded
from .relevance import RelevanceRules

Method = Literal["raw", "rollout", "attribution", "gradcam", "lrp"]
METHODS: tuple[Method, ...] = get_args(Method)


def explain(
    model: TimmModel,
    images: Tensor,
    target: int | Tensor | None = None,
    method: Method = "lrp",
    layers: Sequence[int] | None = None,
) -> Tensor:
    """Return how much each pixel counts for the score of a class.

    | method | what it shows | of the class |
    |---|---|---|
    | "raw" | what the class token's scan takes from each token, the mean of the layers | no |
    | "rollout" | the layers' hidden attention, multiplied up, each with its residual connection | no |
    | "attribution" | the same, each row weighted by the score's gradient of the scan's output | yes |
    | "gradcam" | the features before the last norm, weighted by the score's gradient | yes |
    | "lrp" | relevance, which sums to the score; negative where the image speaks against the class | yes |

    Without a class token, the first two take the mean of all tokens. Relevance is that of the tokens that the first
    block takes; of a model with stages, that of the pixels.

    Args:
        images: (b, c, h, w), or (b, c, t, h, w) for a video model.
        target: a class, or (b,) classes; None for the predicted class.
        layers: for the first three methods, the indices of the layers that scan; None for all.

    Returns:
        (b, h, w), or (b, t, h, w), at least float32.

    Raises:
        UserError: the method or the class is unknown, the method needs a scan of tokens and the model has none, or the
            model is none of this package's.
    """
    if method not in METHODS:
        raise UserError(f"method must be one of {METHODS}, got {method!r} {closest(method, METHODS)}")
    _check_input(model, images)
    with frozen(model):
        maps = _RUN[method](model, images.detach().clone().requires_grad_(), target, layers)
        return _resize(maps, images.shape[2:])


def _check_input(model: nn.Module, images: Tensor) -> None:
    if not isinstance(getattr(model, "_orig_mod", model), TimmModel):  # torch.compile wraps one
        raise UserError(f"maps need one of this package's models of images or videos, got {type(model).__name__}")
    if images.dim() not in (4, 5) or not images.is_floating_point():
        raise UserError(
            "images must be normalised, (b, c, h, w), or (b, c, t, h, w) for a video model, "
            f"got {images.dtype} {tuple(images.shape)}"
        )


def _score(model: TimmModel, logits: Tensor, target: int | Tensor | None) -> Tensor:
    """Return the sum over images of the target's logit."""
    count = model.num_classes
    if count == 0 or logits.dim() != 2:
        raise UserError(
            f"a model with classes is needed, got an output {tuple(logits.shape)}: build it with num_classes"
        )
    classes = logits.argmax(1) if target is None else torch.as_tensor(target, device=logits.device)
    if classes.is_floating_point() or classes.dtype == torch.bool:
        raise UserError(f"target must be a whole number, got {classes.dtype}")
    if classes.shape not in ((), logits.shape[:1]):
        raise UserError(f"target must be a class, or one for each of {len(logits)} images, got {tuple(classes.shape)}")
    if classes.min() < 0 or classes.max() >= count:
        raise UserError(f"target must be a class from 0 to {count - 1}, got {target}")
    return logits.gather(1, classes.long().expand(len(logits)).unsqueeze(1)).sum()


def _lrp(model: TimmModel, images: Tensor, target: int | Tensor | None, layers: object) -> Tensor:
    if model.blocks == "stages":  # the tokens behind its stem are too coarse: on to the pixels
        with RelevanceRules():
            logits = model(images)
        (gradient,) = torch.autograd.grad(_score(model, logits, target), images)
        return (images * gradient).sum(1)
    with _kept_input(getattr(model, model.blocks)[0]) as kept, RelevanceRules():
        logits = model(images)
    (gradient,) = torch.autograd.grad(_score(model, logits, target), kept)
    return model.tokens_to_map((kept[0] * gradient).sum(-1, keepdim=True), images.shape[2:]).squeeze(1)


def _gradcam(model: TimmModel, images: Tensor, target: int | Tensor | None, layers: object) -> Tensor:
    with _kept_input(model.norm_f) as kept:
        logits = model(images)
    (gradient,) = torch.autograd.grad(_score(model, logits, target), kept)
    weights = gradient.flatten(1, -2).mean(1)  # (b, d), of all tokens: a class token alone may have a gradient
    weighted = torch.einsum("b...d,bd->b...", kept[0], weights)
    return F.relu(model.tokens_to_map(weighted.unsqueeze(-1), images.shape[2:]).squeeze(1))


@contextmanager
def _kept_input(module: nn.Module) -> Iterator[list[Tensor]]:
    """Keep what a module takes, in the list returned."""
    kept: list[Tensor] = []
    hook = module.register_forward_pre_hook(in_this_thread(lambda _, arguments: kept.append(arguments[0])))
    try:
        yield kept
    finally:
        hook.remove()


def _raw(model: TimmModel, images: Tensor, target: object, layers: Sequence[int] | None) -> Tensor:
    return torch.stack(_layer_maps(model, images, layers, "both", None)).mean(0)


def layer_maps(
    model: TimmModel,
    images: Tensor,
    layers: Sequence[int] | None = None,
    direction: Direction = "both",
    token: Sequence[int] | None = None,
) -> list[Tensor]:
    """Return what one token takes from each other token, in each layer.

    It needs no matrix: time and memory are linear in the tokens.

    Args:
        images: (b, c, h, w), or (b, c, t, h, w) for a video model.
        layers: indices of the layers that scan, also from the end; None for all.
        direction: "forward" and "backward" leave out the scans of the other direction.
        token: row and column of a patch, after its frame for a video model; where layers have maps of several sizes, in
            the first one's. None for the class token, or the mean of all tokens of a model without one.

    Returns:
        for each layer (b, h, w), or (b, t, h, w), each image's scaled to 0 to 1 before the mean over the channels.

    Raises:
        UserError: the model has no scans of tokens, no such layer, or no such token.
        ValueError: there is no such direction.
    """
    check_choice("direction", direction, get_args(Direction))
    _check_input(model, images)
    with frozen(model):
        return _layer_maps(model, images, layers, direction, token)


def _layer_maps(
    model: TimmModel,
    images: Tensor,
    layers: Sequence[int] | None,
    direction: Direction,
    token: Sequence[int] | None,
) -> list[Tensor]:
    with torch.no_grad(), recorded(model, layers) as found:
        features = model.forward_features(images)
    pooled, first = _pooled_tokens(model, features), found[0].grid
    maps = []
    for one in found:
        if token is not None:
            rows = _one_token(model, images, one, first, token).to(pooled.dtype).expand(len(images), -1)
        elif one.grid is not None:
            rows = pooled.new_full((len(images), math.prod(one.grid)), 1 / math.prod(one.grid))
        else:
            rows = pooled
        attended = _min_max(token_attention(one, rows, direction)).mean(2)
        maps.append(_resize(_token_map(model, attended, one.grid, images), images.shape[2:]))
    return maps


def _one_token(
    model: TimmModel, images: Tensor, one: Recorded, first: Sequence[int] | None, token: Sequence[int]
) -> Tensor:
    """Return (1, l), 1 for a token of a layer's map and 0 for all others."""
    l = one.scan[0].u.shape[2] if one.scan else 0
    numbers = torch.arange(l, device=images.device).unsqueeze(0)
    places = _token_map(model, numbers, one.grid, images)[0]
    sizes = tuple(places.shape if one.grid is None or first is None else first)
    if len(token) != len(sizes) or not all(0 <= place < size for place, size in zip(token, sizes, strict=True)):
        raise UserError(f"token must be in a map of {' x '.join(map(str, sizes))}, got {','.join(map(str, token))}")
    place = [i * size // old for i, size, old in zip(token, places.shape, sizes, strict=True)]
    return (numbers == places[tuple(place)]).float()


def _rollout(model: TimmModel, images: Tensor, target: object, layers: Sequence[int] | None) -> Tensor:
    with torch.no_grad(), recorded(model, layers) as found:
        features = model.forward_features(images)
    weights = _pooled_tokens(model, features)
    return _multiply_up(model, images, found, weights, [None] * len(found))


def _attribution(model: TimmModel, images: Tensor, target: int | Tensor | None, layers: Sequence[int] | None) -> Tensor:
    with recorded(model, layers) as found:
        features = model.forward_features(images)
    score = _score(model, model.forward_head(features), target)
    gradients = torch.autograd.grad(score, [cast(Tensor, one.gated) for one in found])
    means = [gradient.mean(-1).flatten(1) for gradient in gradients]  # (b, l) each
    return _multiply_up(model, images, found, _pooled_tokens(model, features), means)


@torch.no_grad()
def _multiply_up(
    model: TimmModel, images: Tensor, found: list[Recorded], weights: Tensor, gradients: Sequence[Tensor | None]
) -> Tensor:
    """Follow the weights (b, l) of the tokens after the last layer back to the first, and return them as a map."""
    grid = None
    for one, gradient in zip(reversed(found), reversed(gradients), strict=True):
        if one.grid != grid and grid is not None and one.grid is not None:
            weights = _spread(weights, grid, one.grid)
        grid = one.grid
        matrix = layer_attention(one, "both", "mean", False, False)
        weights = follow_back(weights, matrix if gradient is None else matrix * gradient.unsqueeze(2))
    return _token_map(model, weights, grid, images)


def follow_back(weights: Tensor, matrix: Tensor) -> Tensor:
    """Return the weights (b, l) of the tokens before a layer and its residual connection from those after it.

    Negative entries of the matrix (b, l, l) count as 0: its rows, normalised, would not be bounded with them.
    """
    matrix = matrix.clamp(min=0) + torch.eye(matrix.shape[-1], device=matrix.device, dtype=matrix.dtype)
    return torch.bmm(weights.unsqueeze(1).to(matrix.dtype), matrix / matrix.sum(2, keepdim=True)).squeeze(1)


def _spread(weights: Tensor, grid: Sequence[int], finer: Sequence[int]) -> Tensor:
    """Divide the weights of a map's tokens among those of the finer map before it."""
    spread = F.interpolate(weights.unflatten(1, tuple(grid)).unsqueeze(1), size=tuple(finer)).flatten(1)
    return spread * (math.prod(grid) / math.prod(finer))


def _token_map(model: TimmModel, weights: Tensor, grid: Sequence[int] | None, images: Tensor) -> Tensor:
    """Return weights (b, l) of tokens as a map (b, ..., rows, columns)."""
    tokens = weights if grid is None else weights.unflatten(1, tuple(grid))
    return model.tokens_to_map(tokens.unsqueeze(-1), images.shape[2:]).squeeze(1)


def _pooled_tokens(model: TimmModel, features: Tensor) -> Tensor:
    """Return how much of each token is in the pooled features, (b, l): one for a class token, or all alike."""
    features = features.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(model.pool(features).sum(), features)
    weights = gradient.abs().sum(2) if features.dim() == 3 else gradient.abs().sum(1).flatten(1)
    return weights / weights.sum(1, keepdim=True)


def _min_max(x: Tensor) -> Tensor:
    """Scale each image's (l, d) to 0 to 1."""
    low, high = x.amin((1, 2), keepdim=True), x.amax((1, 2), keepdim=True)
    return (x - low) / (high - low).clamp(min=torch.finfo(x.dtype).tiny)


_RUN = {"raw": _raw, "rollout": _rollout, "attribution": _attribution, "gradcam": _gradcam, "lrp": _lrp}


def _resize(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Return maps (b, ..., rows, columns) at another size, at least float32."""
    mode = "bilinear" if len(size) == 2 else "trilinear"
    maps = maps.detach().to(torch.promote_types(maps.dtype, torch.float32))
    return F.interpolate(maps.unsqueeze(1), size=tuple(size), mode=mode, align_corners=False).squeeze(1)
