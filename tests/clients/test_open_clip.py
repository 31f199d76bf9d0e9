"""open_clip: every family is the image tower of a model that a file describes."""

import pytest

from tests.clients.page import FAMILIES, run, snippet

open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_with_every_parameter(name, folder):
    (folder / f"clip_{name}.json").write_text(snippet("open_clip", "json", name))
    page = run("open_clip", name)
    page["loss"].backward()
    parameters = dict(page["model"].visual.named_parameters())
    assert [key for key, parameter in parameters.items() if parameter.grad is None] == []
    page["model"].lock_image_tower()
    assert {key for key, parameter in parameters.items() if parameter.requires_grad} == {"head.proj.weight"}


def test_mambars_own_pooling():
    tower = open_clip.model.CLIPVisionCfg(timm_model_name="test_mambar", timm_pool="token", timm_proj="", image_size=64)
    assert open_clip.model._build_vision_tower(32, tower).trunk.head.weight.shape == (32, 96)
