"""Images that fill neither patches nor windows, against numbers that a plain float64 version computed."""

import re

import pytest
import timm

import vim  # noqa: F401  registers the models
from tests.golden.check import check_outputs, load_cases, published_weights
from vim.checkpoints import checkpoint_filter_fn

CASES = load_cases("sizes.json")


def mixer(block):
    """Our name of the mixer of a published block."""
    return re.sub(r"\w+\.(\d+)\.blocks\.(\d+)", r"stages.\1.layers.\2.0", block) + ".mixer"


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_outputs(case, backend, monkeypatch):
    monkeypatch.setenv("VIM_BACKEND", backend)
    model = timm.create_model(case["model"], **case["options"]).eval()
    model.load_state_dict(checkpoint_filter_fn({"model": published_weights(case)}, model))
    check_outputs(case, model, mixer)
