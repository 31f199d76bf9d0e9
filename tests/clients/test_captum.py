"""Captum: gradients through the fused ops add up to the change of a logit."""

import pytest
import torch

from tests.clients.page import FAMILIES, run

pytest.importorskip("captum", reason="captum is not installed")


@pytest.mark.parametrize("name", FAMILIES)
def test_integrated_gradients_are_complete(name):
    torch.manual_seed(0)
    page = run("Captum", name)
    model, image, maps = page["model"], page["image"], page["maps"]
    change = (model(image) - model(torch.zeros_like(image)))[0, page["label"]].item()
    assert maps.shape == image.shape
    assert maps.sum().item() == pytest.approx(change, rel=0.02)


def test_each_activation_is_a_module_of_its_own():
    """Which DeepLift asks for."""
    from captum.attr import DeepLift

    page = run("Captum", "test_mambavision")
    maps = DeepLift(page["model"]).attribute(page["image"], target=0)
    assert maps.isfinite().all() and maps.any()
