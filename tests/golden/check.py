"""Compare a published model's outputs, recorded in a file, with ours for the same weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.golden.weights import generate, weight
from vim.kernels import available_backends

TOLERANCE = 1e-5
# the definition goes token by token: test_other_sizes.py runs it, on small images
FAST_BACKENDS = [name for name in available_backends() if name != "reference"]


def load_cases(filename: str) -> dict[str, dict[str, Any]]:
    """The cases of a file in this folder, by name."""
    return {case["name"]: case for case in json.loads((Path(__file__).parent / filename).read_text())["cases"]}


def published_weights(case: dict[str, Any]) -> dict[str, Tensor]:
    """The state dict that the case was run with."""
    return {key: weight(key, shape) for key, shape in case["state_dict"].items()}


def check_keys(case: dict[str, Any], model: nn.Module) -> None:
    """Names, shapes and the number of parameters."""
    assert {name: list(t.shape) for name, t in model.state_dict().items()} == case["state_dict"]
    assert sum(p.numel() for p in model.parameters()) == case["num_params"]


@torch.no_grad()
def check_outputs(
    case: dict[str, Any],
    model: Any,
    mixer_of: Callable[[str], str] = lambda block: f"{block}.mixer",
    tolerance: float = TOLERANCE,
) -> None:
    """The patch embedding, some mixers' outputs, the stages' maps, the features and the logits.

    Args:
        mixer_of: the name of the mixer of a block of the published code.
    """
    image = generate(case["input"]["seed"], case["input"]["shape"])
    seen: dict[str, Tensor] = {}
    for name in case["block_outputs"]:
        mixer = model.get_submodule(mixer_of(name))
        mixer.register_forward_hook(lambda module, args, out, name=name: seen.update({name: out}))
    model.patch_embed.register_forward_hook(lambda module, args, out: seen.update(patches=out))
    tokens = model.forward_features(image)
    features = model.forward_head(tokens, pre_logits=True)
    logits = model(image)

    patches = seen["patches"]  # the published code puts a clip's channels first
    assert relative(patches if patches.dim() == 4 else patches.movedim(-1, 1), case["patch_embed_first"]) < tolerance
    for name, want in case["block_outputs"].items():
        check_tokens(seen[name], want, tolerance)
    if "stage_outputs" in case:
        maps = model.forward_intermediates(image, intermediates_only=True)
        for stage, want in zip(maps, case["stage_outputs"].values(), strict=True):
            check_tokens(stage.movedim(1, -1), want, tolerance)
    per_image = torch.tensor(case["pre_head_first"]).view(case.get("pre_head_images", len(image)), -1)
    assert relative(features[: len(per_image), : per_image.shape[1]], per_image.tolist()) < tolerance
    assert features.std().item() == pytest.approx(case["pre_head_std"], rel=tolerance)
    assert relative(logits[:, : len(case["logits_first"][0])], case["logits_first"]) < tolerance
    assert logits.std().item() == pytest.approx(case["logits_std"], rel=tolerance)
    assert logits.argmax(1).tolist() == case["logits_argmax"]


def check_tokens(got: Tensor, want: dict[str, Any], tolerance: float = TOLERANCE) -> None:
    """Tokens (b, l, d), or maps (b, rows, columns, d)."""
    assert list(got.shape) == want["shape"]
    tokens = got.flatten(1, -2)
    assert relative(tokens[0, 0], want["first_token"]) < tolerance
    assert relative(tokens[0, -1], want["last_token"]) < tolerance
    assert got.std().item() == pytest.approx(want["std"], rel=tolerance)


def relative(got: Tensor, want: list[Any]) -> float:
    """The error of the first numbers of a tensor."""
    first = torch.tensor(want).flatten()
    return ((got.flatten()[: first.numel()] - first).norm() / first.norm()).item()
