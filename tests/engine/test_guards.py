import errno
import logging
import os
import signal

import pytest
import timm
import torch
from accelerate import Accelerator

from tests.engine.test_loop import assert_same, load
from tests.tiny import FewDigits, few_digits, run_of, tiny_recipe
from vim.data.datasets import BUILT_IN
from vim.engine.guards import advice, first_bad_layer
from vim.engine.loop import Loop
from vim.errors import UserError
from vim.kernels import selective_scan

NAN = float("nan")


@pytest.fixture(autouse=True)
def short(monkeypatch):
    few_digits(monkeypatch)


def spoil(monkeypatch, when):
    """Give images that are not numbers in those updates."""
    update = Loop._update

    def spoiled(self, batches, number):
        if number in when:
            batches = [batch._replace(images=batch.images * NAN) for batch in batches]
        return update(self, batches, number)

    monkeypatch.setattr(Loop, "_update", spoiled)


def test_an_update_that_is_not_finite_is_skipped_and_its_first_layer_named(tmp_path, monkeypatch, caplog):
    spoil(monkeypatch, {2, 5})
    with caplog.at_level(logging.WARNING, logger="vim"):
        trainer = run_of(tiny_recipe(train__max_skipped=2), tmp_path)
        trainer.fit()
    told = [message for message in caplog.messages if "skipped" in message]
    assert told == [
        f"update {number} skipped, the loss is nan: the output of patch_embed.proj is not finite" for number in (3, 6)
    ]
    assert all(parameter.isfinite().all() for parameter in trainer.task.model.parameters())
    assert "update 3 skipped" in (tmp_path / "train.log").read_text()


def test_a_gradient_that_is_not_finite_is_skipped(tmp_path, monkeypatch, caplog):
    trainer = run_of(tiny_recipe(schedule__num_epochs=1), tmp_path)
    trainer.task.model.head.weight.register_hook(lambda grad: grad * NAN)
    before = [parameter.clone() for parameter in trainer.task.model.parameters()]
    with caplog.at_level(logging.WARNING, logger="vim"):
        trainer.fit()
    assert "the gradient of head.weight is not finite" in caplog.text
    for one, other in zip(before, trainer.task.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_scaler_of_half_precision_finds_its_scale(tmp_path, monkeypatch):
    """With one put where accelerate has it on a GPU; its first scale is too large."""
    build = Accelerator.__init__

    def with_scaler(self, **options):
        build(self, **options)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-20, growth_interval=100)

    def unscale(self):
        self.scaler.unscale_(self._optimizers[0].optimizer)

    monkeypatch.setattr(Accelerator, "__init__", with_scaler)
    monkeypatch.setattr(Accelerator, "unscale_gradients", unscale)
    trainer = run_of(tiny_recipe(schedule__num_epochs=1, train__save_updates=1, train__keep=5), tmp_path)
    loss, before = trainer.task.criterion, trainer.task.model.head.weight.clone()
    trainer.task.criterion = lambda outputs, targets: 2**10 * loss(outputs, targets)
    trainer.fit()
    saves = [load(tmp_path / f"last.{number}.pth")["training"] for number in (4, 3, 2, 1)]
    assert [save["scaler"]["scale"] for save in saves] == [2.0**107] * 4
    assert [save["position"]["counted"] for save in saves] == [0, 1, 2, 3]
    assert torch.equal(saves[0]["model"]["head.weight"], before)
    assert not torch.equal(saves[1]["model"]["head.weight"], before)
    assert all(parameter.isfinite().all() for parameter in trainer.task.model.parameters())


def test_too_many_in_a_row_stop_the_run(tmp_path, monkeypatch):
    spoil(monkeypatch, {5, 6, 7})
    message = f"3 updates in a row were skipped.*loss of nan: the output of patch_embed.proj.*--resume from {tmp_path}"
    with pytest.raises(UserError, match=message):
        run_of(tiny_recipe(train__max_skipped=3), tmp_path).fit()
    assert load(tmp_path / "last.pth")["training"]["position"]["epoch"] == 1


def test_the_first_of_the_bad_layers():
    model = timm.create_model("test_vim", img_size=32, depth=3)
    with torch.no_grad():
        model.layers[1].mixer.in_proj.weight.fill_(NAN)
    assert first_bad_layer(model, lambda: model(torch.randn(1, 3, 32, 32))) == "the output of layers.1.mixer.in_proj"
    sound = timm.create_model("test_vim", img_size=32)
    assert first_bad_layer(sound, lambda: sound(torch.randn(1, 3, 32, 32))) == "the loss"


def test_of_bad_gradients_the_last_layers_is_named():
    """It is the first that the backward pass meets: the others follow from it."""
    model = timm.create_model("test_vim", img_size=32, depth=3)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for layer in model.layers[:2]:
        layer.mixer.in_proj.weight.grad.fill_(NAN)
    found = first_bad_layer(model, lambda: model(torch.randn(1, 3, 32, 32)))
    assert found == "the gradient of layers.1.mixer.in_proj.weight"


def test_in_half_precision_the_residual_does_not_overflow():
    """Published Vim diverges in float16 (https://github.com/hustvl/Vim/issues/30); here sums stay float32."""
    torch.manual_seed(0)
    model = timm.create_model("test_vim", img_size=32, depth=24).eval()
    image = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        for layer in model.layers:  # each adds up to about 3e4, where float16 ends at 65,504
            layer.mixer.out_proj.weight *= 3e4 / layer.mixer(layer.norm(model._embed(image)[0])).abs().max()
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        half = model._embed(image)[0].half()
        for layer in model.layers:
            half = half + layer.mixer(layer.norm(half.float())).half()
        assert not half.isfinite().all()
        assert model(image).isfinite().all()


def test_in_half_precision_the_state_of_the_scan_does_not_overflow(backend):
    length = 200
    options = {"dtype": torch.float16}
    u, delta = torch.full((1, length, 4), 10.0, **options), torch.ones(1, length, 4, **options)
    A, B, C = torch.full((4, 2), -1e-4), torch.full((1, length, 2), 100.0, **options), torch.full((1, length, 2), 1e-3)
    y, state = selective_scan(u, delta, A, B, C.half(), return_last_state=True, backend=backend)
    assert state.min() > 65504
    want = selective_scan(u.double(), delta.double(), A.double(), B.double(), C.half().double(), backend="reference")
    torch.testing.assert_close(y.double(), want, rtol=2e-3, atol=0)


def test_a_full_disk(tmp_path, monkeypatch):
    config = tiny_recipe(train__save_updates=1)
    run_of(tiny_recipe(schedule__num_epochs=1), tmp_path).fit()
    before, sync = load(tmp_path / "last.pth"), os.fsync

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    trainer = run_of(config, tmp_path, tmp_path / "last.pth")
    with pytest.raises(UserError, match=f"cannot write to {tmp_path} .No space left on device.: make room .* --resume"):
        trainer.fit()
    monkeypatch.setattr(os, "fsync", sync)
    assert_same(load(tmp_path / "last.pth"), before)
    assert not list(tmp_path.glob("*.part"))


def test_a_disk_that_became_read_only(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("vim.engine.loop.write_csv", refuse)
    with pytest.raises(UserError, match="Read-only file system"):
        run_of(tiny_recipe(), tmp_path).fit()
    assert load(tmp_path / "last.pth")["training"]["position"]["epoch"] == 1


class Deadly(FewDigits):
    """Kills the process that loads it, which is not the one that trains."""

    owner = os.getpid()

    def __getitem__(self, index):
        if os.getpid() != self.owner and index == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def test_a_worker_that_is_killed(tmp_path, monkeypatch):
    monkeypatch.setitem(BUILT_IN, "digits", Deadly)
    with pytest.raises(UserError, match=r"a process that loads images died .*lower data.num_workers.* --resume"):
        run_of(tiny_recipe(data__num_workers=1), tmp_path).fit()


def test_what_a_worker_met_is_not_its_death(tmp_path):
    with pytest.raises(RuntimeError, match="^Caught RuntimeError in DataLoader worker process 0"), advice(tmp_path):
        raise RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback ...")


def test_a_full_gpu(tmp_path, monkeypatch):
    trainer = run_of(tiny_recipe(), tmp_path)

    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(trainer.task.model, "forward", full)
    with pytest.raises(UserError, match="memory is full: halve data.batch_size and double train.accumulate"):
        trainer.fit()
