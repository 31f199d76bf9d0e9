"""Lightning: a step in mixed precision, and its checkpoint, which our loader reads too."""

import pytest
import torch

from tests.clients.page import run

pytest.importorskip("lightning", reason="lightning is not installed")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["test_vim", "test_mambavision"])
def test_train_save_and_load(name, folder):
    page = run("Lightning", name)
    image = torch.randn(2, 3, 64, 64)
    want = page["trainer"].model.model.eval()(image)
    assert want.isfinite().all() and page["trainer"].global_step == 2
    assert torch.equal(page["again"].model.eval()(image), want)
    assert torch.equal(page["model"].eval()(image), want)
