"""A tiny model, its weights, and files of them as trainers write them."""

import argparse
import io
import re

import pytest
import timm
import torch

import vim.checkpoints
from vim.errors import UserError

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_classes": 10}
TABLE, CONV, PROJ = "pos_embed", "patch_embed.proj.weight", "layers.1.mixer.in_proj.weight"
HEAD, BIAS, NORM = "head.weight", "head.bias", "norm_f.weight"
FEATURES = {"features_only": True, "out_indices": (0, 1), "num_classes": None}


def build(path=None, *, name="test_vim", overlay=None, **changes):
    """A tiny model of ten classes, with the weights in a file where one is named."""
    overlay = {"num_classes": 10, **({"file": str(path)} if path else {}), **(overlay or {})}
    return timm.create_model(name, pretrained=bool(path), pretrained_cfg_overlay=overlay, **{**TINY, **changes})


def random_weights(seed=0, **changes):
    """Of eighths, so that any floating-point type holds them."""
    torch.manual_seed(seed)
    return {key: torch.randint(-8, 9, value.shape) / 8 for key, value in build(**changes).state_dict().items()}


WEIGHTS, AVERAGE = random_weights(), random_weights(1)


def published(weights, average):
    """The layout of the authors' files."""
    options = argparse.Namespace(lr=1e-3, model="vim", distributed=True, device=torch.device("cpu"))
    optimizer = {"state": {0: {"step": 1, "exp_avg": torch.ones(3)}}, "param_groups": [{"betas": (0.9, 0.95)}]}
    rest = {"optimizer": optimizer, "lr_scheduler": {"lr": 1e-3}, "epoch": 299, "scaler": {"scale": 65536.0}}
    return {"model": weights, "model_ema": average, "args": options, **rest}


def save(path, content, **options):
    torch.save(content, path, **options)
    return path


def assert_weights(model, weights, but=()):
    state = model.state_dict()
    assert state.keys() - set(but) == weights.keys() - set(but)
    assert all(torch.equal(state[key], weights[key]) for key in state.keys() - set(but))


def assert_refused(path, message):
    """By each way from a file to a model; nothing of it is loaded."""
    model = build()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for load in (lambda: vim.checkpoints.load_pretrained(model, path), lambda: build(path)):
        with pytest.raises(UserError) as caught:
            load()
        line = str(caught.value)
        assert re.search(message, line), line
        assert str(path) in line
        assert len(line.splitlines()) == 1
        assert "weights_only=False" not in line and "False" not in line
    assert_weights(model, before)


def without(*keys):
    return {key: value for key, value in WEIGHTS.items() if key not in keys}


def prefixed(prefix, weights=WEIGHTS):
    return {f"{prefix}{key}": value for key, value in weights.items()}


class Call:
    """Pickled, it is a call."""

    def __init__(self, function, *args, state=None):
        self.reduced = (function, args, state) if state else (function, args)

    def __reduce__(self):
        return self.reduced

    def __call__(self):
        """It may be what is called."""


def saved(content, **options):
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


CODE = "open('made', 'w')"
EVAL = Call(eval, CODE)
