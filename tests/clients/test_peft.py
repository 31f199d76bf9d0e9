"""PEFT: adapters of all linear layers have gradients, and merge, in every family."""

import pytest
import timm
import torch

from tests.clients.page import FAMILIES, run

peft = pytest.importorskip("peft", reason="peft is not installed")


@pytest.mark.parametrize(("name", "use_dora"), [*((name, False) for name in FAMILIES), ("test_vim", True)])
def test_all_linear(name, use_dora):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # none of them zero
            parameter.add_(0.02 * torch.randn_like(parameter))
    linears = [key for key, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    options = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, use_dora=use_dora)
    model, image = peft.get_peft_model(model, options).eval(), torch.randn(2, 3, 64, 64)
    want = model(image)
    want.square().sum().backward()
    trained = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == (3 if use_dora else 2) * len(linears)
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in trained.values())
    with torch.no_grad():
        torch.testing.assert_close(model.merge_and_unload()(image), want, rtol=1e-4, atol=1e-5)


def test_the_page(folder):
    torch.manual_seed(0)
    page = run("PEFT", "test_vim")
    adapted = {key for key, parameter in page["model"].named_parameters() if parameter.requires_grad}
    assert {key.split(".")[-3] for key in adapted if "layers.0" in key} >= {"lora_A", "lora_B"}
    merged, plain = page["merged"].state_dict(), timm.create_model("test_vim").state_dict()
    assert merged.keys() == plain.keys()
    torch.testing.assert_close(merged["head.weight"], page["model"].base_model.model.head.weight)
