"""transformers: its classes for timm's models train, save and load ours."""

import pytest
import timm
import torch

from tests.clients.page import run
from tests.tiny import write_image
from vim.checkpoints import load_pretrained

pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["test_vim", "test_mambar", "test_vssd"])
def test_train_save_and_load(name, folder, fresh_accelerate):
    write_image(folder / "picture.png", 70, 80)
    page = run("transformers", name)
    trained, loaded = page["trainer"].model.timm_model.eval(), page["model"].eval()
    assert loaded is not trained and not torch.equal(trained.head.weight, page["backbone"].head.weight)
    image = torch.randn(2, 3, 64, 64)
    want = trained(image)
    assert torch.equal(loaded(image).logits, want)
    assert torch.equal(page["again"].eval()(image), want)
    ours = timm.create_model(name, num_classes=3).eval()
    load_pretrained(ours, folder / "work_dirs/pets/model.safetensors")
    assert torch.equal(ours(image), want)
    assert {answer["label"] for answer in page["answers"]} == {"cat", "dog", "bird"}
    assert page["process"].data_config["input_size"] == (3, 64, 64)
    hidden = loaded(image, output_hidden_states=True)
    torch.testing.assert_close(hidden.logits, want)
    assert all(map_.dim() == 4 for map_ in hidden.hidden_states)
