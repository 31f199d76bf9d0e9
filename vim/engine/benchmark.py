"""What ops and models take: time, throughput and peak memory, compared side by side within one run."""

import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vim  # noqa: F401  registers the models
from vim.engine.timing import peak_memory, side_by_side
from vim.errors import UserError, describe
from vim.kernels import available_backends, selective_scan

PASSES = ("forward", "training step")


@dataclass(frozen=True)
class Row:
    """One figure. Speeds are relative to the row of the same comparison that is called `baseline`."""

    name: str
    run: str
    batch_size: int
    size: int  # pixels of a model's images, tokens of an op's
    milliseconds: float
    per_second: float
    peak_mb: float
    baseline: str
    speed: float


def compare(
    runs: Mapping[str, Callable[[], object]], *, run: str, batch_size: int, size: int, rounds: int
) -> list[Row]:
    """Measure runs in turns; the last one is the baseline."""
    medians = side_by_side(runs, rounds)
    memory = {name: peak_memory(call) for name, call in runs.items()}
    baseline = list(runs)[-1]
    return [
        Row(
            name,
            run,
            batch_size,
            size,
            milliseconds=1e3 * taken,
            per_second=batch_size / taken,
            peak_mb=memory[name] / 1e6,
            baseline=baseline,
            speed=medians[baseline] / taken,
        )
        for name, taken in medians.items()
    ]


def compare_scans(
    batch_size: int,
    device: str,
    *,
    tokens: int = 197,
    channels: int = 768,
    states: int = 16,
    passes: Sequence[str] = ("forward", "forward+backward"),
    rounds: int,
) -> list[Row]:
    """The scan's backends on Vim-Small's shapes, with softplus, D and gate; the loop over tokens is the baseline."""
    torch.manual_seed(0)
    u, delta, z = torch.randn(3, batch_size, tokens, channels, device=device)
    B, C = torch.randn(2, batch_size, tokens, states, device=device)
    D, delta_bias = torch.randn(2, channels, device=device)
    A = -torch.arange(1.0, states + 1, device=device).repeat(channels, 1)
    tensors = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": delta_bias - 3}

    def scan(backend: str, backward: bool) -> None:
        leaves = {name: tensor.detach().requires_grad_(backward) for name, tensor in tensors.items()}
        y: Any = selective_scan(**leaves, delta_softplus=True, backend=backend)
        if backward:
            torch.autograd.grad(y.sum(), list(leaves.values()))

    rows = []
    for run in passes:
        names = [name for name in available_backends() if name != "reference"] + ["reference"]
        calls = {f"scan, {name}": partial(scan, name, run != "forward") for name in names}
        rows += compare(calls, run=run, batch_size=batch_size, size=tokens, rounds=rounds if run == "forward" else 2)
    return rows


def compare_models(
    names: Sequence[str],
    *,
    img_size: int,
    batch_size: int,
    device: str,
    amp: str,
    passes: Sequence[str] = PASSES,
    rounds: int,
) -> list[Row]:
    """Forward passes and training steps (loss, backward, AdamW) of timm models; the last one is the baseline.

    Raises:
        UserError: no such model, or it takes no images of that size.
    """
    try:
        image = torch.randn(batch_size, 3, img_size, img_size, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"there is no device {device} here ({describe(error)})") from error
    labels = torch.zeros(batch_size, dtype=torch.long, device=device)
    context = _autocast(device, amp)
    models = {name: _build(name, img_size).to(device) for name in names}
    rows = []
    for run in passes:
        calls: dict[str, Callable[[], object]] = {}
        for name, model in models.items():
            if run == "forward":
                calls[name] = partial(_forward, model.eval(), image, context)
            else:
                optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-5)
                calls[name] = partial(_step, model, optimizer, image, labels, context)
        rows += compare(calls, run=run, batch_size=batch_size, size=img_size, rounds=rounds)
    return rows


def _autocast(device: str, amp: str) -> Callable[[], AbstractContextManager[Any]]:
    if amp == "no":
        return nullcontext
    return partial(torch.autocast, device, torch.bfloat16 if amp == "bf16" else torch.float16)


def _build(name: str, img_size: int) -> nn.Module:
    cfg = timm.get_pretrained_cfg(name)
    options: dict[str, Any] = {"img_size": img_size} if cfg and cfg.fixed_input_size else {}  # others take any size
    try:
        return timm.create_model(name, **options)
    except Exception as error:  # a model raises many kinds
        raise UserError(f"cannot build {name} at {img_size} pixels: {describe(error)}") from error


@torch.inference_mode()
def _forward(model: nn.Module, image: Tensor, context: Callable[[], AbstractContextManager[Any]]) -> None:
    with context():
        model(image)


def _step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    image: Tensor,
    labels: Tensor,
    context: Callable[[], AbstractContextManager[Any]],
) -> None:
    with context():
        loss = F.cross_entropy(model(image).float(), labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def compare_imports() -> str:
    """A line on what `import vim` adds to `import timm`, each in a process of its own."""
    codes = ("import timm", "import timm, vim")
    calls = {code: partial(subprocess.run, [sys.executable, "-c", code], check=True) for code in codes}
    alone, both = side_by_side(calls, rounds=5).values()
    return f"import vim adds {both - alone:.2f} s to import timm ({alone:.2f} s)"


def plot(rows: Sequence[Row], out: Path) -> None:
    """Draw time and memory over the size of the images, a line a model and kind of run."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    lines = sorted({(row.name, row.run, row.batch_size) for row in rows})
    for name, run, batch_size in lines:
        own = sorted(
            (r for r in rows if (r.name, r.run, r.batch_size) == (name, run, batch_size)), key=lambda r: r.size
        )
        sizes, label = [row.size for row in own], f"{name}, {run}, batch {batch_size}"
        axes[0].plot(sizes, [row.milliseconds for row in own], "o-", label=label)
        axes[1].plot(sizes, [row.peak_mb for row in own], "o-", label=label)
    for axis, ylabel in zip(axes, ("milliseconds", "peak memory, MB"), strict=True):
        axis.set(xlabel="pixels a side, or tokens of an op", ylabel=ylabel, xscale="log", yscale="log")
        axis.grid(alpha=0.3, which="both")
    axes[1].legend(fontsize="x-small")
    figure.savefig(out, dpi=100)
    plt.close(figure)
