"""fastai: a learner with a head of its own on our features, of tokens and of maps."""

import pytest

from tests.clients.page import run
from tests.tiny import write_folder, write_image

pytest.importorskip("fastai", reason="fastai is not installed")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "pooled"), [("test_vim", False), ("test_vmamba", True), ("test_mambar", False)])
def test_fine_tune_and_predict(name, pooled, folder, capsys):
    write_folder(folder / "images")
    write_image(folder / "picture.png", 70, 80)
    page = run("fastai", name)
    body, head = page["learner"].model
    assert body.needs_pool is pooled
    assert next(head.parameters()).shape == ((1 + pooled) * body.model.num_features,)
    assert page["label"] in ("cat", "dog") and page["probabilities"].sum().item() == pytest.approx(1)
