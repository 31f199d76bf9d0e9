import errno
import io
import logging
import os
import signal
import subprocess
import sys

import pytest
import timm
import torch
from accelerate import Accelerator
from safetensors import SafetensorError

from tests.engine.test_loop import assert_same, load
from tests.tiny import FewDigits, few_digits, run_of, tiny_recipe
from vim.data.datasets import BUILT_IN
from vim.engine.files import locked, naming
from vim.engine.guards import StopRequest, advice, first_bad_layer
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


def test_weights_that_are_not_finite_replace_no_save(tmp_path, monkeypatch):
    update = Loop._update

    def spoiled(self, batches, number):
        result = update(self, batches, number)
        if number == 6:
            self.task.model.head.bias.data[0] = NAN
        return result

    monkeypatch.setattr(Loop, "_update", spoiled)
    with pytest.raises(UserError, match="head.bias is not finite after update 8: .* the saves in .* are of before"):
        run_of(tiny_recipe(), tmp_path).fit()
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


def test_a_disk_that_is_full_within_a_save(tmp_path, monkeypatch):
    """PyTorch raises a RuntimeError of its own."""
    run_of(tiny_recipe(schedule__num_epochs=1), tmp_path).fit()
    before, save = load(tmp_path / "last.pth"), torch.save

    class Full(io.RawIOBase):
        def __init__(self, file):
            self.file, self.room = file, 20_000

        def writable(self):
            return True

        def write(self, data):
            self.room -= len(data)
            if self.room < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.file.write(data)

    monkeypatch.setattr(torch, "save", lambda state, file: save(state, Full(file)))
    trainer = run_of(tiny_recipe(), tmp_path, tmp_path / "last.pth")
    with pytest.raises(UserError, match=f"cannot write to {tmp_path} .No space left on device.: make room .* --resume"):
        trainer.fit()
    assert_same(load(tmp_path / "last.pth"), before)
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("error", [RuntimeError("PytorchStreamWriter failed writing file data/1"), "rust"], ids=str)
def test_what_libraries_raise_for_a_failing_disk(error, tmp_path):
    if error == "rust":
        error = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(OSError) as caught, naming(tmp_path / "a"):
        raise error
    assert caught.value.filename == str(tmp_path / "a")
    with pytest.raises(RuntimeError, match="something else"), naming(tmp_path / "a"):
        raise RuntimeError("something else")


@pytest.mark.parametrize("name", ["train.log", "config.py", "environment.txt", "log.csv"])
def test_a_file_that_cannot_be_written(name, tmp_path, monkeypatch, capsys):
    sync, trainer = os.fsync, run_of(tiny_recipe(), tmp_path)

    def full(descriptor):
        if name in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    class Log(io.StringIO):
        def write(self, text):
            raise OSError(errno.ENOSPC, "No space left on device")

    if name == "train.log":
        monkeypatch.setattr(logging.FileHandler, "_open", lambda self: Log())
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=f"cannot write to {tmp_path} .No space left on device.: make room"):
        trainer.fit()
    assert "Traceback" not in capsys.readouterr().err


def test_a_folder_that_is_taken_away(tmp_path, monkeypatch):
    update = Loop._update

    def taking(self, batches, number):
        if number == 2:
            (tmp_path / "run").rename(tmp_path / "elsewhere")
        return update(self, batches, number)

    monkeypatch.setattr(Loop, "_update", taking)
    with pytest.raises(
        UserError, match=r"cannot write to .*run \(No such file or directory\): put the folder back; .*"
    ):
        run_of(tiny_recipe(train__save_updates=1), tmp_path / "run").fit()
    assert load(tmp_path / "elsewhere/last.pth")["training"]["position"]["update"] == 2


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


# Signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_the_run(number, tmp_path, monkeypatch, capfd):
    update = Loop._update

    def signalled(self, batches, at):
        if at == 1:
            os.kill(os.getpid(), number)
        return update(self, batches, at)

    monkeypatch.setattr(Loop, "_update", signalled)
    loop = run_of(tiny_recipe(), tmp_path)
    assert not loop.fit()
    assert load(tmp_path / "last.pth")["training"]["position"]["update"] == 2
    with pytest.raises(SystemExit) as end:
        loop.stop.leave(tmp_path)
    assert end.value.code == {signal.SIGTERM: 0, signal.SIGINT: 130, signal.SIGHUP: 129}[number]
    out, err = capfd.readouterr()
    assert f"stopped by {number.name}; the run is saved in {tmp_path}: go on with the same command and --resume" in out
    assert err.startswith(f"{number.name}: the run ends after this update")


def test_a_second_interrupt_ends_at_once():
    for alone in (True, False):
        stop = StopRequest(alone=alone)
        with stop.watch():
            os.kill(os.getpid(), signal.SIGINT)
            if alone:
                with pytest.raises(KeyboardInterrupt, match="go on with the same command and --resume"):
                    os.kill(os.getpid(), signal.SIGINT)
            else:
                os.kill(os.getpid(), signal.SIGINT)
        assert stop.came == signal.SIGINT
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_under_nohup_a_hangup_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop = StopRequest(alone=True)
        with stop.watch():
            os.kill(os.getpid(), signal.SIGHUP)
        assert stop.came is None and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


# Locks

HOLD = """
import sys
from pathlib import Path
from vim.engine.files import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_folder_is_held_by_one_process_until_it_is_killed(tmp_path):
    folder = tmp_path / "run"
    other = subprocess.Popen([sys.executable, "-c", HOLD, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"held\n"
    with pytest.raises(UserError, match=f"{folder} is in use by process {other.pid} on .*: wait until that ends"):
        locked(folder).__enter__()
    other.kill()
    other.communicate()
    with locked(folder):
        assert str(os.getpid()) in (folder / ".lock").read_text()
    assert not list(folder.iterdir())


def test_a_folder_that_a_failed_run_made_is_removed(tmp_path):
    with pytest.raises(UserError), locked(tmp_path / "run"):
        raise UserError("no such data")
    assert not (tmp_path / "run").exists()


def test_a_file_system_without_locks(tmp_path, monkeypatch, caplog):
    def refuse(*ignored):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", refuse)
    with locked(tmp_path):
        assert f"{tmp_path} cannot be locked (No locks available): start no second run there" in caplog.text
