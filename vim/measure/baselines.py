"""Ways to mix tokens compared: attention, linear attention, S4D by FFT, the selective scan, state space duality.

Each maps one image's tokens (1, l, d) to the same and lets every token see all others, so the scans run in both
directions. The projections before and after are left out.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from vim.errors import UserError, describe, require
from vim.kernels import available_backends, selective_scan, ssd
from vim.layers import Factory, S4DKernel, convolve
from vim.measure.ops import PASSES, run_op
from vim.measure.timing import peak_memory, side_by_side

HEAD_DIM = 64
BOTH: dict[str, Any] = {"reverse": [False, True], "combine": "sum"}  # directions of a scan
STATES = {"S4D": 64, "selective scan": 16, "ssd": 64}  # as published
ATTENTION = {
    SDPBackend.MATH: "math",
    SDPBackend.FLASH_ATTENTION: "flash",
    SDPBackend.EFFICIENT_ATTENTION: "efficient",
    SDPBackend.CUDNN_ATTENTION: "cudnn",
}


class Mixing(NamedTuple):
    """An op, its inputs by name, and the FLOPs of its forward pass."""

    op: Callable[..., Tensor]
    inputs: Mapping[str, Tensor]
    flops: float


@dataclass(frozen=True)
class Baseline:
    """The figures of one op in one pass.

    Attributes:
        gflops_per_second: of the counted FLOPs, see :data:`COUNTS`.
        skipped: why it was not run; the figures are then None.
    """

    name: str
    run: str
    width: int
    tokens: int
    milliseconds: float | None = None
    peak_mb: float | None = None
    gflops_per_second: float | None = None
    skipped: str = ""

    def __str__(self) -> str:
        """The row as a line of text, below :data:`HEADER`."""
        figures = (self.milliseconds, self.peak_mb, self.gflops_per_second)
        shown = "".join(f"{figure:>10.2f}" for figure in figures if figure is not None)
        return f"{self.name:<20}{self.run:<17}{self.width:>6}{self.tokens:>7}{shown or f'  skipped: {self.skipped}'}"


HEADER = f"{'':<37}{'width':>6}{'tokens':>7}{'ms':>10}{'peak MB':>10}{'GFLOP/s':>10}"
COUNTS = """\
The ops let every token see all others: scans run in both directions. FLOPs of a forward pass, for l tokens of d
channels: attention 4 l l d; linear attention 4 l d 64; S4D 15 l log2(2 l) d for the FFTs and 4 l d 64 for the kernels,
which are made in each pass; the selective scan 2 9 l d 16; ssd, state space duality, 2 5 l d 64. With the backward pass
three times as many. peak MB: what PyTorch allocates in a run, on top of the inputs."""


def compare_baselines(
    tokens: Sequence[int], widths: Sequence[int], *, device: str, amp: str, rounds: int
) -> Iterator[Baseline]:
    """Compare all ops that the machine has, forwards and backwards. They take turns; the least times count.

    An op is skipped at a length if its memory at the two lengths before lets expect more than is free.

    Args:
        widths: d, multiples of 64, the channels of a head.
        amp: "no", "bf16" or "fp16": the dtype of the inputs.

    Raises:
        UserError: a number is below 1 or a width no multiple of 64, or there is no such device.
    """
    if min(*tokens, rounds) < 1:
        raise UserError(f"tokens and rounds must be at least 1, got {min(*tokens, rounds)}")
    wrong = next((d for d in widths if d < HEAD_DIM or d % HEAD_DIM), None)
    if wrong is not None:
        raise UserError(f"a width must be a multiple of {HEAD_DIM}, the channels of a head, got {wrong}")
    dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
    backends = sdpa_backends(device, dtype)
    for d in widths:
        peaks: dict[tuple[str, str], dict[int, float]] = {}
        for l in sorted(tokens):
            mixings = mixings_of(l, d, device=device, dtype=dtype, backends=backends)
            for run in PASSES:
                free, runs = free_memory(device), {}
                for name, (op, inputs, _) in mixings.items():
                    need = extrapolate(peaks.setdefault((name, run), {}), l)
                    if need > free:
                        about = f"needs about {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
                        yield Baseline(name, run, d, l, skipped=about)
                    else:
                        runs[name] = partial(run_op, op, inputs, run != PASSES[0])
                times = side_by_side(runs, rounds, of_all=min)
                for name, taken in times.items():
                    peak = peaks[name, run][l] = peak_memory(runs[name])
                    work = mixings[name].flops * (1 if run == PASSES[0] else 3)
                    yield Baseline(name, run, d, l, 1e3 * taken, peak / 1e6, work / taken / 1e9)


def mixings_of(l: int, d: int, *, device: str, dtype: torch.dtype, backends: Sequence[SDPBackend]) -> dict[str, Mixing]:
    """Draw the inputs of every op, by its name with the backend that runs it."""
    torch.manual_seed(0)
    heads, full = d // HEAD_DIM, Factory(device=device)
    random = Factory(device=device, dtype=dtype)
    q, k, v = torch.randn(3, 1, heads, l, HEAD_DIM, **random)
    mixings = {
        f"attention, {ATTENTION[backend]}": Mixing(
            partial(attention, backend=backend), {"q": q, "k": k, "v": v}, 4 * l * l * d
        )
        for backend in backends
    }
    mixings["linear attention"] = Mixing(linear_attention, {"q": q, "k": k, "v": v}, 4 * l * d * HEAD_DIM)

    x = torch.randn(1, l, d, **random)
    kernel = S4DKernel(d, d_state=STATES["S4D"], channels=2, **full)  # forwards and backwards
    flops = 15 * l * math.log2(2 * l) * d + 4 * l * d * STATES["S4D"]
    mixings["S4D by FFT"] = Mixing(partial(s4d, kernel), {"x": x, **dict(kernel.named_parameters())}, flops)

    fastest, n = available_backends(device)[-1], STATES["selective scan"]
    delta, (B, C) = torch.randn(1, 2, l, d, **random), torch.randn(2, 1, 2, l, n, **random)
    A = -torch.arange(1.0, n + 1, **full).repeat(2, d, 1)
    D, bias = torch.randn(2, 2, d, **full)
    inputs = {"x": x, "delta": delta, "A": A, "B": B, "C": C, "D": D, "delta_bias": bias - 3}
    mixings[f"selective scan, {fastest}"] = Mixing(partial(scan, backend=fastest), inputs, 2 * 9 * l * d * n)

    n = STATES["ssd"]
    dt, (B, C) = torch.randn(1, 2, l, heads, **random), torch.randn(2, 1, 2, l, n, **random)
    D, bias = torch.randn(2, 2, heads, **full)
    inputs = {"x": x, "dt": dt, "A": -torch.rand(2, heads, **full), "B": B, "C": C, "D": D, "dt_bias": bias - 3}
    mixings[f"ssd, {fastest}"] = Mixing(partial(duality, backend=fastest), inputs, 2 * 5 * l * d * n)
    return mixings


def attention(q: Tensor, k: Tensor, v: Tensor, *, backend: SDPBackend) -> Tensor:
    """Scaled dot product attention of (b, h, l, p) by one of PyTorch's backends."""
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v)


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of (b, h, l, p) with phi(q) phi(k) for exp(q k), phi = elu + 1: https://arxiv.org/abs/2006.16236."""
    q, k = F.elu(q) + 1, F.elu(k) + 1
    return (q @ (k.transpose(-2, -1) @ v)) / (q @ k.sum(-2).unsqueeze(-1))


def s4d(kernel: S4DKernel, x: Tensor, **parameters: Tensor) -> Tensor:
    """Convolve (b, l, d) with the kernels that parameters make, forwards and backwards."""
    forwards, backwards = torch.func.functional_call(kernel, parameters, (x.shape[1],))  # (d, l) each
    return convolve(x.transpose(1, 2), forwards, backwards).transpose(1, 2)


def scan(x: Tensor, delta: Tensor, **others: Any) -> Tensor:
    """Scan (b, l, d) in both directions, by the selective scan with softplus, and add them up."""
    y = selective_scan(x.unsqueeze(1).expand(-1, 2, -1, -1), delta, **others, delta_softplus=True, **BOTH)
    assert isinstance(y, Tensor)  # no last state was asked for
    return y


def duality(x: Tensor, dt: Tensor, **others: Any) -> Tensor:
    """Scan (b, l, d) in both directions, by state space duality with softplus, and add them up."""
    heads = x.unflatten(2, (-1, HEAD_DIM)).unsqueeze(1).expand(-1, 2, -1, -1, -1)
    y = ssd(heads, dt, **others, dt_softplus=True, **BOTH)
    assert isinstance(y, Tensor)  # no last state was asked for
    return y.flatten(2)


def sdpa_backends(device: str, dtype: torch.dtype) -> list[SDPBackend]:
    """Return the backends of scaled dot product attention that run on this machine, forwards and backwards.

    Raises:
        UserError: there is no such device.
    """
    try:
        q = torch.zeros(1, 1, 16, HEAD_DIM, device=device, dtype=dtype, requires_grad=True)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"there is no device {device} here ({describe(error)})") from error
    found = []
    for backend in ATTENTION:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # why a backend does not run
                attention(q, q, q, backend=backend).sum().backward()
        except RuntimeError:
            continue
        found.append(backend)
    return found


def free_memory(device: str) -> int:
    """Return how many bytes a run can allocate on a device."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return require("psutil", "the comparison of baselines").virtual_memory().available


def extrapolate(measured: Mapping[int, float], l: int) -> float:
    """Return what a power of the length through the last two measured values gives at length l; 0 for fewer."""
    if len(measured) < 2:
        return 0.0
    (l1, y1), (l2, y2) = sorted(measured.items())[-2:]
    return y2 * (l / l2) ** (math.log(y2 / y1) / math.log(l2 / l1))


def crossover(own: Mapping[int, float], other: Mapping[int, float]) -> float:
    """Return the length from which on `own` times are below `other` ones: 0 for all lengths, infinity for none.

    Between two lengths both times are taken as powers of the length. Lengths that only one of them has do not count.
    """
    lengths = sorted(own.keys() & other.keys())
    gaps = [math.log(own[l] / other[l]) for l in lengths]
    if not gaps or gaps[-1] >= 0:
        return math.inf
    for i in reversed(range(len(lengths) - 1)):
        if gaps[i] >= 0:
            return lengths[i] * (lengths[i + 1] / lengths[i]) ** (gaps[i] / (gaps[i] - gaps[i + 1]))
    return 0.0


def show_baselines(rows: Iterable[Baseline]) -> list[Baseline]:
    """Print rows as they come, since the longest take minutes; then what they count, and the crossovers."""
    require("rich", "the table")
    from rich.console import Console

    console, shown = Console(width=120, highlight=False), []
    console.print(HEADER)
    for row in rows:
        console.print(str(row))
        shown.append(row)
    console.print(COUNTS)
    console.print(crossovers(shown))
    return shown


def crossovers(rows: Sequence[Baseline]) -> str:
    """Return from how many tokens on S4D and the scans take less time than attention, by op, pass and width."""
    times: dict[tuple[str, int], dict[str, dict[int, float]]] = {}
    for row in rows:
        if row.milliseconds is not None:
            times.setdefault((row.run, row.width), {}).setdefault(row.name, {})[row.tokens] = row.milliseconds
    names = dict.fromkeys(row.name for row in rows)
    others = [name for name in names if "attention" in name]
    lines = [f"{'faster than':<37}{'width':>6}  " + "".join(f"{name:>22}" for name in others)]
    for name in (name for name in names if name.startswith(("S4D", "selective scan", "ssd"))):
        for (run, width), own in times.items():
            lengths = [_words(crossover(own.get(name, {}), own.get(other, {}))) for other in others]
            lines.append(f"{name:<20}{run:<17}{width:>6}  " + "".join(f"{length:>22}" for length in lengths))
    return "\n".join(lines)


def _words(length: float) -> str:
    """Say from which length on."""
    if math.isinf(length):
        return "at no length"
    return f"from {length:.0f} tokens" if length else "at every length"


def plot_baselines(rows: Sequence[Baseline], out: Path) -> None:
    """Draw time over tokens, a panel for each pass and width."""
    import matplotlib.pyplot as plt

    widths, names = sorted({row.width for row in rows}), list(dict.fromkeys(row.name for row in rows))
    size = (3.2 * len(widths) + 2, 5.6)
    figure, panels = plt.subplots(2, len(widths), figsize=size, layout="constrained", sharex=True, squeeze=False)
    for line, run in zip(panels, PASSES, strict=True):
        for axes, width in zip(line, widths, strict=True):
            for name in names:
                own = [row for row in rows if (row.name, row.run, row.width) == (name, run, width)]
                times = [math.nan if row.milliseconds is None else row.milliseconds for row in own]
                axes.plot([row.tokens for row in own], times, "o-", markersize=3, label=name)
            axes.set(xscale="log", yscale="log", title=f"{run}, width {width}")
            axes.grid(alpha=0.3)
    figure.supxlabel("tokens")
    figure.supylabel("milliseconds")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside right center", fontsize="small")
    figure.savefig(out, dpi=70)
    plt.close(figure)
