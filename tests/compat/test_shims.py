"""Programs with "cuda" written into them, on a machine without a GPU."""

import sys

import pytest
import torch
from torch import nn

import vim.compat
from tests.compat.test_install import clean  # noqa: F401
from vim.compat import runner
from vim.compat.raw_scan import SelectiveScan

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def test_shims():
    x = torch.ones(2)
    with pytest.raises((RuntimeError, AssertionError)):
        x.cuda()
    vim.compat.install(cpu_shims=True)
    with torch.cuda.device(x.device):
        assert x.cuda() is x
    model = torch.nn.Linear(2, 2).cuda().to("cuda:0").to(device=torch.device("cuda"))
    made = torch.zeros(2, device="cuda") + torch.ones(2).to("cuda", torch.float64) + model(x.to("cuda"))
    torch.cuda.synchronize()
    torch.cuda.set_device(0)
    assert made.device.type == "cpu" and made.dtype == torch.float64
    vim.compat.uninstall()
    with pytest.raises((RuntimeError, AssertionError)):
        x.cuda()


class MadeInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad + torch.ones(2, device="cuda")


def test_devices_types_and_events(tmp_path):
    vim.compat.install(cpu_shims=True)
    x = torch.ones(2, requires_grad=True)
    MadeInBackward.apply(x).sum().backward()
    assert x.grad.tolist() == [2, 2]
    assert x.to(0).device.type == torch.zeros(1, device=0).device.type == "cpu"
    assert x.type(torch.cuda.LongTensor).dtype == x.type("torch.cuda.LongTensor").dtype == torch.long
    assert torch.cuda.FloatTensor([1, 2]).pin_memory().tolist() == [1, 2]
    torch.save(x, tmp_path / "x.pt")
    for place in ("cuda", torch.device("cuda", 0), {"cuda:0": "cuda:1"}, lambda storage, location: storage):
        assert torch.load(f=tmp_path / "x.pt", map_location=place).tolist() == [1, 1]
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    end.record()
    end.synchronize()
    assert start.elapsed_time(end) >= 0 and end.query()
    with torch.cuda.device(device=0):
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.reset_accumulated_memory_stats()
        torch.cuda.empty_cache()
        torch.cuda.ipc_collect()
    free, total = torch.cuda.mem_get_info()
    assert 0 < free <= total == torch.cuda.get_device_properties(0).total_memory
    assert (torch.cuda.memory_summary(0), torch.cuda.memory_reserved(), torch.cuda.utilization()) == ("", 0, 0)
    assert torch.cuda.get_device_capability(0) == (0, 0) and torch.cuda.initial_seed() == torch.initial_seed()
    assert torch.cuda.get_device_name(0) == torch.cuda.get_device_properties(0).name == "CPU"


def test_streams():
    vim.compat.install(cpu_shims=True)
    side = torch.cuda.Stream(device=0)
    x = torch.ones(2)
    with torch.cuda.stream(side):
        y = x.cuda(non_blocking=True) + 1
        event = side.record_event()
    torch.cuda.current_stream().wait_stream(side)
    side.wait_event(event)
    y.record_stream(torch.cuda.default_stream())
    side.synchronize()
    assert side.query() and y.tolist() == [2, 2]


def test_random_numbers():
    vim.compat.install(cpu_shims=True)
    drawn = []
    for seed in (torch.cuda.manual_seed, torch.cuda.manual_seed_all, torch.manual_seed):
        seed(3)
        drawn.append(torch.rand(4, device="cuda"))
    for device in ("cuda", torch.device("cuda:0"), "cpu"):
        generator = torch.Generator(device).manual_seed(3)
        assert isinstance(generator, torch.Generator) and generator.device.type == "cpu"
        drawn.append(torch.rand(4, device="cuda", generator=generator))
    states = torch.cuda.get_rng_state(), torch.cuda.get_rng_state_all()
    numbers = [torch.rand(4)]
    torch.cuda.set_rng_state(states[0], device=0)
    numbers.append(torch.rand(4))
    torch.cuda.set_rng_state_all(states[1])
    numbers.append(torch.rand(4))
    for same in (drawn, numbers):
        assert all(torch.equal(same[0], other) for other in same)


class Published(torch.autograd.Function):
    """A fast path as forks have it: it casts by CUDA's autocast, and multiplies what it kept in the backward pass."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cuda")
    def forward(ctx, u, delta, A, B, C, weight):
        if torch.is_autocast_enabled():
            weight = weight.to(torch.get_autocast_gpu_dtype())
        out, x = SelectiveScan.fwd(u, delta, A, B, C, None, None, None, True)
        ctx.save_for_backward(u, delta, A, B, C, weight, x, out)
        return nn.functional.linear(out.transpose(1, 2), weight)

    @staticmethod
    @torch.amp.custom_bwd(device_type="cuda")
    def backward(ctx, dout):
        *inputs, weight, x, out = ctx.saved_tensors
        dy = (weight.t() @ dout.flatten(0, 1).t()).unflatten(1, dout.shape[:2]).transpose(0, 1)
        grads = SelectiveScan.bwd(*inputs, None, None, None, dy, x, None, None, True, False)
        dweight = torch.einsum("blo,bdl->od", dout, out)
        return *grads[:5], dweight


@pytest.mark.parametrize("entered", ["cpu", "cuda", "cuda.amp"])
@pytest.mark.parametrize("wanted", [torch.float16, torch.bfloat16])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_fast_path_of_a_fork_in_autocast(entered, wanted):
    vim.compat.install(cpu_shims=True)
    torch.manual_seed(0)
    u, delta, weight = torch.randn(2, 4, 9), torch.randn(2, 4, 9), torch.randn(3, 4)
    A, B, C = -torch.rand(4, 3), torch.randn(2, 1, 3, 9), torch.randn(2, 1, 3, 9)
    inputs = [t.requires_grad_() for t in (u, delta, A, B, C, weight)]
    expected = torch.autograd.grad(Published.apply(*inputs).square().sum(), inputs)
    if entered == "cuda.amp":
        context = torch.cuda.amp.autocast(dtype=wanted)
    else:
        context = torch.autocast(entered, dtype=torch.bfloat16 if entered == "cpu" else wanted)
    with context:
        halves = [t.to(torch.bfloat16) if t.dim() > 2 else t for t in inputs]
        y = Published.apply(*halves)
        assert torch.is_autocast_enabled() and torch.get_autocast_gpu_dtype() == torch.bfloat16
    assert y.dtype == torch.bfloat16 and not torch.is_autocast_enabled()
    grads = torch.autograd.grad(y.float().square().sum(), inputs)
    for ours, theirs in zip(grads, expected, strict=True):
        assert (ours - theirs).abs().max() < 0.05 * theirs.abs().max()


TRAIN = """
import sys

import torch
import torch.backends.cudnn as cudnn
import torch.distributed as dist
from mamba_ssm import Mamba
from torch import nn
from torch.cuda.amp import GradScaler, autocast
from torch.utils.data import DataLoader, TensorDataset


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.mixer, self.head = Mamba(8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.mixer(x).mean(1))


def main(folder):
    torch.cuda.set_device(0)
    dist.init_process_group(backend="nccl", init_method=f"file://{folder}/store", rank=0, world_size=1)
    torch.manual_seed(1)
    torch.cuda.manual_seed_all(1)
    cudnn.benchmark, cudnn.deterministic = True, True
    device, generator = torch.device("cuda"), torch.Generator("cuda")
    data = TensorDataset(torch.randn(8, 6, 8), torch.randint(0, 3, (8,)))
    loader = DataLoader(data, 4, shuffle=True, num_workers=1, pin_memory=True)
    model = nn.parallel.DistributedDataParallel(Model().to(device), device_ids=[0], output_device=0)
    model = nn.DataParallel(model.module, device_ids=[0]).cuda()
    criterion, scaler = nn.CrossEntropyLoss().cuda(), GradScaler()
    optimizer = torch.optim.AdamW(model.parameters())
    for images, labels in loader:
        images, labels = images.cuda(non_blocking=True), labels.to(device, non_blocking=True)
        images = images + 0.1 * torch.randn(images.shape, device=device, generator=generator)
        with autocast():
            loss = criterion(model(images), labels)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        torch.cuda.synchronize()
    saved = {"model": model.module.state_dict(), "states": torch.cuda.get_rng_state_all()}
    torch.save(saved, f"{folder}/last.pth")
    saved = torch.load(f"{folder}/last.pth", map_location="cuda")
    model.module.load_state_dict(saved["model"])
    torch.cuda.set_rng_state_all(saved["states"])
    dist.destroy_process_group()
    print(loss.isfinite().item(), f"{torch.cuda.max_memory_allocated() / 2**20:.0f} MB")


if __name__ == "__main__":
    main(sys.argv[1])
"""


@pytest.mark.filterwarnings("ignore")
def test_a_training_program(tmp_path, monkeypatch, capsys):
    (tmp_path / "train.py").write_text(TRAIN)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", ["vim-compat", "--cpu-shims", str(tmp_path / "train.py"), str(tmp_path)])
    runner.main()
    assert capsys.readouterr().out == "True 0 MB\n"
    vim.compat.uninstall()
    with pytest.raises((RuntimeError, AssertionError)):
        torch.Generator("cuda")
