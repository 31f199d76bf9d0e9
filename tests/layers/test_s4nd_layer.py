import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.golden.lti import noise
from tests.golden.weights import generate
from vim.layers import S4ND, S4Kernel, S4NDDownsample, S4NDStem

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/s4nd.json").read_text())["cases"]
CASES = {  # the noise's tag, and the options
    "linear_depthwise": ("lin", {"out": "none"}),
    "full_layer": ("full", {}),
    "full_layer_channels2": ("ch2", {"channels": 2}),
}
TOLERANCE = {torch.float32: 1e-4, torch.float64: 2e-9}  # of the largest value; nine digits were written down


def golden_layer(tag, channels=1, **options):
    layer = S4ND(8, kind="s4d", d_state=16, channels=channels, **options)
    for axis, kernel in enumerate(layer.kernels):
        name = f"s4nd.{axis}"
        values = {
            "inv_dt": torch.linspace(math.log(0.1), 0, 8, dtype=torch.float64)[:, None] + 0.05 * axis,
            "A_real": math.log(0.5) + 0.1 * noise(f"{name}.A_real", (1, 8)),
            "A_imag": -math.pi * torch.arange(8, dtype=torch.float64) - 0.1 * noise(f"{name}.A_imag", (1, 8)),
            "B": torch.tensor([1.0, 0.0]) + 0.1 * noise(f"{name}.B", (1, 8, 2)),
            "C": noise(f"{name}.C.{tag}", (2 * channels, 8, 8, 2)),
        }
        kernel.double().load_state_dict({key: v.reshape(kernel.get_parameter(key).shape) for key, v in values.items()})
    layer.double()
    with torch.no_grad():
        layer.D.copy_(1 + 0.1 * noise("s4nd.D", (channels, 8)))
        if layer.output_linear is not None:
            weight = noise("s4nd.output_linear.weight", (16, 8 * channels)) / math.sqrt(8 * channels)
            layer.output_linear.weight.copy_(weight)
            layer.output_linear.bias.copy_(0.02 * noise("s4nd.output_linear.bias", (16,)))
    return layer


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_golden_values(name, dtype):
    tag, options = CASES[name]
    layer, want = golden_layer(tag, **options).to(dtype), GOLDEN[name]
    y = layer(generate(11, (2, 8, 14, 14)).movedim(1, -1).to(dtype)).movedim(-1, 1).double()
    largest, flat = y.abs().max().item(), y.flatten().tolist()
    close = {"rel": TOLERANCE[dtype], "abs": TOLERANCE[dtype] * largest}
    assert flat[:8] == pytest.approx(want["first8"], **close)
    assert flat[-8:] == pytest.approx(want["last8"], **close)
    assert y[0, 3, 7].tolist() == pytest.approx(want["row7_channel3"], **close)
    assert y.norm().item() == pytest.approx(want["norm"], **close)
    assert y.mean().item() == pytest.approx(want["mean"], **close)


def two_sided(x, kernel, axis):
    """The sums along an axis of x (b, ..., d), token by token; the kernel is (2, d, l)."""
    x, l = x.movedim(axis, 0), x.shape[axis]
    y = torch.zeros_like(x)
    for t in range(l):
        for j in range(min(t + 1, kernel.shape[2])):
            y[t] += kernel[0, :, j] * x[t - j]
        for j in range(min(l - 1 - t, kernel.shape[2])):
            y[t] += kernel[1, :, j] * x[t + 1 + j]
    return y.movedim(0, axis)


def powers(kernel, l, rate=1.0, bandlimit=None):  # the band is that of the training
    """The kernel (2, d, l) by complex powers, of zero-order hold."""
    A = -torch.complex(kernel.A_real.exp(), kernel.A_imag)
    dt = kernel.inv_dt.exp()
    B, C = torch.view_as_complex(kernel.B)[0], torch.view_as_complex(kernel.C)
    step = torch.exp(rate * dt * A)  # (d, m)
    weight = C * B * (step - 1) / A
    if bandlimit is not None:
        weight = weight * (dt * A.imag.abs() / (2 * math.pi) <= bandlimit / 2)
    return torch.stack([2 * (weight * step**k).sum(-1).real for k in range(l)], dim=-1)


SIZES = {1: (9,), 2: (6, 5), 3: (3, 4, 5)}


@pytest.mark.parametrize(
    "options", [{}, {"l_max": 3}, {"rate": 0.5, "l_max": 2}, {"rate": 2.0, "bandlimit": 0.5}], ids=str
)
@pytest.mark.parametrize("longest_matrix", [0, 128])
@pytest.mark.parametrize("axes", SIZES)
@torch.no_grad()
def test_sums_along_each_axis(axes, longest_matrix, options):
    """By FFT and by matrices."""
    torch.manual_seed(0)
    layer = S4ND(
        3,
        axes=axes,
        kind="s4d",
        d_state=6,
        init="lin",
        dt_min=0.1,
        dt_max=1.0,
        out="none",
        dtype=torch.float64,
        **options,
    )
    x = torch.randn(2, *SIZES[axes], 3, dtype=torch.float64)
    layer.longest_matrix = longest_matrix
    want, rate = x, options.get("rate", 1.0)
    for axis, kernel in enumerate(layer.kernels, 1):
        l = min(x.shape[axis], round(options.get("l_max", 99) / rate))
        want = two_sided(want, powers(kernel, l, rate, options.get("bandlimit")), axis)
    torch.testing.assert_close(layer(x), want + layer.D[0] * x, rtol=0, atol=1e-10 * want.abs().max().item())


@torch.no_grad()
def test_the_sum_over_the_channels():
    """Each of `channels` outputs has kernels of its own for each input channel, and no skip connection."""
    torch.manual_seed(0)
    layer = S4ND(3, kind="s4d", d_state=6, channels=2, out="sum", dtype=torch.float64)
    x = torch.randn(2, 6, 5, 3, dtype=torch.float64)
    for channel in range(2):
        want = x
        for axis, kernel in enumerate(layer.kernels, 1):
            want = two_sided(want, powers(kernel, x.shape[axis])[[channel, 2 + channel]], axis)
        torch.testing.assert_close(layer(x)[..., channel], want.sum(-1), rtol=1e-10, atol=1e-10)


def dense(kernel, l, rate=1.0):
    """The kernel (c, d, l) token by token, by complex matrices of all states."""
    outputs = torch.empty(*kernel.C.shape[:2], l, dtype=torch.float64)
    for channel in range(outputs.shape[1]):
        own = channel % kernel.A_real.shape[0]
        both = lambda t: torch.cat([t, t.conj()], dim=-1)  # noqa: E731
        eigenvalues = both(-torch.complex(kernel.A_real[own].exp(), kernel.A_imag[own]))
        B, C, P = (both(torch.view_as_complex(t)) for t in (kernel.B[0, own], kernel.C[:, channel], kernel.P[:, own]))
        A = torch.diag(eigenvalues) - P.T @ P.conj()
        half, identity = rate / 2 * kernel.inv_dt[channel].exp(), torch.eye(len(A))
        state = 2 * half * torch.linalg.solve(identity - half * A, B)
        for k in range(l):
            outputs[:, channel, k] = (C @ state).real
            state = torch.linalg.solve(identity - half * A, (identity + half * A) @ state)
    return outputs


@torch.no_grad()
def test_the_rate_of_s4():
    torch.manual_seed(0)
    kernel = S4Kernel(4, d_state=8, channels=3, init="legt", n_ssm=2, dt_max=0.5, dtype=torch.float64)
    for rate in (1.0, 2.0, 0.5):
        torch.testing.assert_close(kernel(9, rate), dense(kernel, 9, rate), rtol=0, atol=1e-10)


@torch.no_grad()
def test_the_band_of_s4():
    """It leaves out what the fastest states say, not what they pass on to others."""
    kernel = S4Kernel(1, d_state=8, init="fout", bandlimit=0.5, dtype=torch.float64)
    kernel.inv_dt.fill_(math.log(0.2))
    spared = kernel.A_imag.abs() * 0.2 <= math.pi / 2
    assert spared.any() and not spared.all()
    K, kernel.bandlimit = kernel(12), None
    kernel.C.mul_(spared.unsqueeze(-1))
    torch.testing.assert_close(K, kernel(12))


@torch.no_grad()
def test_the_stem_and_the_downsampling_take_the_mean_of_neighbours():
    torch.manual_seed(0)
    x, dd = torch.randn(2, 3, 7, 10), {"device": None, "dtype": None}
    stem = S4NDStem(S4ND(3, kind="s4d", d_state=4, channels=6, out="sum", l_max=3), 6, 5, (4, 4), dd)
    padded = F.pad(x, (0, 2, 0, 1))
    pooled = F.avg_pool2d(stem.mixer(padded.movedim(1, -1)).movedim(-1, 1), 4).movedim(1, -1)
    torch.testing.assert_close(stem(x), F.glu(stem.proj(pooled)))
    down, x = S4NDDownsample(3, 5, S4ND(3, kind="s4d", d_state=4, out="none"), dd), x.movedim(1, -1)
    pooled = F.avg_pool2d(F.pad(down.mixer(down.norm(x)), (0, 0, 0, 0, 0, 1)).movedim(-1, 1), 2).movedim(1, -1)
    torch.testing.assert_close(down(x), F.glu(down.glu[0](pooled)))
    frames = S4NDDownsample(3, 5, None, dd)
    clip = torch.stack([x, x.flip(1)], dim=1)
    torch.testing.assert_close(frames(clip), torch.stack([frames(x), frames(x.flip(1))], dim=1))


@pytest.mark.parametrize("out", ["glu", "sum", "none"])
def test_gradients(out):
    torch.manual_seed(0)
    layer = S4ND(2, kind="s4d", d_state=4, out=out, dtype=torch.float64)
    x = torch.randn(1, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    names = dict(layer.named_parameters())
    call = lambda x, *tensors: torch.func.functional_call(layer, dict(zip(names, tensors, strict=True)), x)  # noqa: E731
    assert torch.autograd.gradcheck(call, (x, *names.values()))


@torch.no_grad()
def test_half_precision():
    """Kernels and sums stay float32 under autocast and in a model of 16 bits."""
    torch.manual_seed(0)
    layer, x = S4ND(8, kind="s4d", d_state=16), torch.randn(2, 14, 14, 8)
    want = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert (layer(x) - want).abs().max() < 2e-2 * want.abs().max()
    plain = S4ND(8, kind="s4d", d_state=16, out="none")
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(plain(x), plain.double()(x.double()).float())
    assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


WRONG = {
    "channels must be 1 .* got 2": {"channels": 2, "out": "none"},
    "rate must be above 0, got 0": {"rate": 0},
    "l_max must be at least 1 and whole, got -3": {"l_max": -3},
    "bandlimit must be above 0": {"bandlimit": -1.0},
    "at most dt_max, got 1.0 and 0.1": {"dt_min": 1.0},
    "kind must be one of .*, got 's6'": {"kind": "s6"},
    "out must be one of .*, got 'mean'": {"out": "mean"},
    "axes must be at least 1 and whole, got 0": {"axes": 0},
}


@pytest.mark.parametrize("message", WRONG)
def test_options_that_make_no_layer(message):
    with pytest.raises(ValueError, match=message):
        S4ND(4, **WRONG[message])
