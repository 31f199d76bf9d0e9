"""selective_scan_fn and the raw extensions against loops in float64."""

import pytest
import torch

from tests.compat import loops
from vim.compat import raw_scan
from vim.compat.layout import op_inputs
from vim.compat.scan import (
    bimamba_inner_fn,
    core_scan_fn,
    mamba_inner_fn,
    mamba_inner_fn_no_out_proj,
    selective_scan_fn,
)

B_, D_, L_, N_ = 2, 6, 11, 3
SHAPES = {"(d,n)": (D_, N_), "(b,n,l)": (B_, N_, L_), "(b,g,n,l)": (B_, 2, N_, L_), "one group": (B_, 1, N_, L_)}


def inputs(shape_B="(b,n,l)", shape_C="(b,n,l)", z=True, dtype=torch.float32, l=L_, r=1):
    torch.manual_seed(0)
    make = {
        "u": torch.randn(B_, D_, l),
        "delta": torch.randn(B_, D_ // r, l) - 1,
        "A": -torch.rand(D_, N_) - 0.1,
        "B": torch.randn(*(l if s == L_ else s for s in SHAPES[shape_B])),
        "C": torch.randn(*(l if s == L_ else s for s in SHAPES[shape_C])),
        "D": torch.randn(D_),
        "z": torch.randn(B_, D_, l) if z else None,
        "delta_bias": torch.randn(D_ // r),
    }
    wide = ("A", "D", "delta_bias", *(name for name in ("B", "C") if make[name].dim() == 2))
    return {
        name: t if t is None else t.to(torch.float32 if name in wide else dtype).requires_grad_()
        for name, t in make.items()
    }


def close(ours, theirs, tolerance=2e-5):
    scale = theirs.abs().max().clamp(min=1e-6)
    assert ours.shape == theirs.shape
    assert ((ours.double() - theirs).abs().max() / scale) < tolerance


def gradients(y, tensors):
    torch.manual_seed(1)
    weights = torch.randn(y.shape, dtype=torch.float64)
    wanted = [t for t in tensors.values() if t is not None]
    return torch.autograd.grad((y.double() * weights).sum(), wanted), weights


@pytest.mark.parametrize("z", [True, False], ids=["gate", "no gate"])
@pytest.mark.parametrize("shape_C", SHAPES)
@pytest.mark.parametrize("shape_B", SHAPES)
def test_the_scan_takes_every_shape_of_its_inputs(shape_B, shape_C, z):
    tensors = inputs(shape_B, shape_C, z)
    y, state = selective_scan_fn(**tensors, delta_softplus=True, return_last_state=True)
    expected, _, last = loops.scan(**tensors, delta_softplus=True)
    assert y.is_contiguous() and y.dtype == torch.float32 and not state.requires_grad
    close(y, expected)
    close(state, last)
    for ours, theirs in zip(gradients(y, tensors)[0], gradients(expected, tensors)[0], strict=True):
        assert ours.dtype == theirs.dtype
        close(ours, theirs.double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_dtypes_are_the_inputs(dtype, autocast):
    tensors = inputs(dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y = selective_scan_fn(**tensors, delta_softplus=True)
    assert y.dtype == dtype
    close(y, loops.scan(**tensors, delta_softplus=True)[0], 0.02)
    y.sum().backward()
    assert [t.grad.dtype for t in tensors.values()] == [t.dtype for t in tensors.values()]


def test_strided_inputs_and_none():
    tensors = inputs()
    xz = torch.randn(2 * D_, B_, L_).transpose(0, 1)  # as a projection of "d (b l)" lies in memory
    u, z = xz.chunk(2, dim=1)
    y = selective_scan_fn(u, *(tensors[name] for name in ("delta", "A", "B", "C")), None, z, None, False, None)
    close(y, loops.scan(u, *(tensors[name] for name in ("delta", "A", "B", "C")), z=z)[0])


@pytest.mark.parametrize(("name", "shape"), [("B", (B_, L_, N_)), ("C", (B_, 4, N_, L_)), ("B", (N_, D_))])
def test_wrong_shapes_are_named(name, shape):
    tensors = {**inputs(), name: torch.zeros(shape)}
    with pytest.raises(ValueError, match=rf"{name} must be \(d, n\), \(b, n, l\) or \(b, g, n, l\)"):
        selective_scan_fn(**tensors)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("delta", torch.ones(B_, D_, L_ + 1)),  # must not be cut to l
        ("z", torch.ones(1, D_, L_)),
        ("D", torch.ones(D_, 1)),
        ("delta_bias", torch.ones(1)),
        ("A", torch.ones(D_ + 1, N_)),
        ("u", torch.ones(B_, D_)),
        ("u", torch.ones(B_, D_, L_, dtype=torch.int64)),
    ],
)
@pytest.mark.parametrize("scan", [selective_scan_fn, raw_scan.SelectiveScan.fwd], ids=["function", "extension"])
def test_wrong_tensors_are_named_in_the_published_layout(name, value, scan):
    sizes = {"D": r"\(d,\)", "delta_bias": r"\(d,\)", "A": r"\(d, n\)"}.get(name, r"\(b, d, l\)")
    with pytest.raises(ValueError, match=rf"^{name} must be {sizes}.*, got \({value.shape[0]},"):
        scan(**{**inputs(), name: value}, delta_softplus=True)


@pytest.mark.parametrize("delta", [torch.ones(B_, D_, L_ + 1), torch.ones(B_, 2 * D_, L_)])
def test_oflex_names_wrong_steps(delta):
    tensors = [delta if name == "delta" else t for name, t in inputs(z=False).items() if name != "z"]
    with pytest.raises(
        ValueError, match=rf"delta must be \(b, d, l\).*got \({B_}, {delta.shape[1]}, {delta.shape[2]}\)"
    ):
        raw_scan.Oflex.fwd(*tensors, True, 1, True)
    with pytest.raises(ValueError, match="u must be .* floating point"):
        raw_scan.Oflex.fwd(tensors[0].long(), *tensors[1:], True, 1, True)


def test_export_with_any_number_of_images():
    p = {name: t.detach() for name, t in inputs().items()}

    class Scan(torch.nn.Module):
        def forward(self, u, B):
            return selective_scan_fn(**{**p, "u": u, "delta": u.sigmoid(), "z": u, "B": B, "C": B})

    first = torch.export.Dim("b", min=1)
    exported = torch.export.export(Scan(), (p["u"], p["B"]), dynamic_shapes=({0: first}, {0: first})).module()
    u, B = torch.randn(D_, D_, L_), torch.randn(D_, N_, L_)  # as many images as channels
    torch.testing.assert_close(exported(u, B), Scan()(u, B))


def test_complex_decays_are_refused():
    with pytest.raises(ValueError, match="A is complex"):
        selective_scan_fn(**{**inputs(), "A": torch.zeros(D_, N_, dtype=torch.complex64)})


@pytest.mark.parametrize("z", [True, False], ids=["gate", "no gate"])
@pytest.mark.parametrize("shape", ["(d,n)", "(b,g,n,l)"])
def test_selective_scan_cuda(shape, z):
    tensors = inputs(shape, shape, z)
    plain = {name: t if t is None else t.detach() for name, t in tensors.items()}
    out, x, *gated = raw_scan.SelectiveScan.fwd(*plain.values(), True)
    expected, ungated, last = loops.scan(**tensors, delta_softplus=True)
    assert len(gated) == int(z) and x.shape == (B_, D_, 1, 2 * N_)
    close(out, ungated)
    close(x[:, :, -1, 1::2], last)
    theirs, dout = gradients(expected, tensors)
    dxz = torch.full((B_, 2 * D_, L_), torch.nan)
    dz = dxz[:, D_:] if z else None
    grads = raw_scan.SelectiveScan.bwd(*plain.values(), dout.float(), x, out if z else None, dz, True, z)
    assert len(grads) == (9 if z else 7)
    order = ("u", "delta", "A", "B", "C", "D", "delta_bias", *(("z",) if z else ()))
    theirs = dict(zip((name for name, t in tensors.items() if t is not None), theirs, strict=True))
    for name, grad in zip(order, grads, strict=False):
        close(grad, theirs[name].double())
    if z:
        close(gated[0], expected)
        close(grads[8], expected)
        close(dxz[:, D_:], theirs["z"].double())
        assert grads[7].data_ptr() == dz.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # of which no native kernel takes the second
def test_states_of_long_sequences_are_in_chunks(dtype):
    tensors = {name: t.detach().to(dtype) for name, t in inputs(z=False, l=4100).items() if t is not None}
    tensors["delta"] = tensors["delta"] - 5
    order = [tensors.get(name) for name in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")]
    out, x = raw_scan.SelectiveScan.fwd(*order, True)
    expected, _, last = loops.scan(**tensors, delta_softplus=True)
    assert x.shape == (B_, D_, 3, 2 * N_)
    close(out, expected)
    close(x[:, :, -1, 1::2], last)
    first = {name: t[..., :2048] if t.shape[-1] == 4100 else t for name, t in tensors.items()}
    close(x[:, :, 0, 1::2], loops.scan(**first, delta_softplus=True)[2])
    dt = torch.nn.functional.softplus(first["delta"] + first["delta_bias"].view(-1, 1)).double().sum(2)
    close(x[:, :, 0, ::2], torch.exp(dt[..., None] * first["A"].double()), 1e-3)
    dt = torch.nn.functional.softplus(tensors["delta"] + tensors["delta_bias"].view(-1, 1)).double().sum(2)
    close(x[:, :, -1, ::2], torch.exp(dt[..., None] * tensors["A"].double()), 1e-3)


def test_the_op_with_states():
    *tensors, z, bias = inputs("(b,g,n,l)", "(b,g,n,l)").values()
    plain = op_inputs(*(t.detach() for t in (*tensors, z, bias)))
    tests = ("test_schema", "test_faketensor")
    for save in (True, False):
        options = {"reverse": [0], "delta_softplus": True, "save": save}
        torch.library.opcheck(torch.ops.vim.selective_scan_with_states, plain, options, test_utils=tests)


@pytest.mark.parametrize("kept", [True, False], ids=["states kept", "states lost"])
def test_gradients_of_long_sequences(kept):
    tensors = inputs("(b,g,n,l)", "(b,n,l)", True, l=2100)
    plain = [t.detach() for t in tensors.values()]
    out, x, _ = raw_scan.SelectiveScan.fwd(*(tensors.values() if kept else plain), True)
    y = selective_scan_fn(*tensors.values(), True)
    theirs, dout = gradients(y, tensors)
    assert hasattr(x, "_parts") == kept
    ours = raw_scan.SelectiveScan.bwd(*plain, dout.float(), x, out, None, True, True)
    close(ours[8], y.double())
    for one, other in zip([*ours[:6], ours[7], ours[6]], theirs, strict=True):
        close(one, other.double())


@pytest.mark.parametrize("r", [1, 2, 3])
@pytest.mark.parametrize("out_float", [True, False])
def test_oflex(r, out_float):
    tensors = inputs("(b,g,n,l)", "(b,g,n,l)", False, torch.bfloat16, r=r)
    del tensors["z"]
    plain = [t.detach() for t in tensors.values()]
    out, x = raw_scan.Oflex.fwd(*plain, True, 1, out_float)
    expected, _, _ = loops.scan(**tensors, delta_softplus=True)
    assert out.dtype == (torch.float32 if out_float else torch.bfloat16)
    close(out, expected, 0.02)
    theirs, dout = gradients(expected, tensors)
    grads = raw_scan.Oflex.bwd(*plain, dout.float(), x, True, 1)
    assert [g.dtype for g in grads] == [t.dtype for t in plain]
    for ours, wanted in zip(grads, theirs, strict=True):
        close(ours, wanted.double(), 0.03)


def mixer(bias):
    torch.manual_seed(0)
    r = 2
    return {
        "xz": torch.randn(B_, 2 * D_, L_),
        "conv": torch.randn(D_, 1, 4),
        "conv_bias": torch.randn(D_) if bias else None,
        "x_proj": torch.randn(r + 2 * N_, D_) / 3,
        "dt_proj": torch.randn(D_, r) / 3,
        "out_proj": torch.randn(5, D_) / 3,
        "out_bias": torch.randn(5) if bias else None,
        "A": -torch.rand(D_, N_),
        "A_b": -torch.rand(D_, N_),
        "D": torch.randn(D_),
        "delta_bias": torch.randn(D_),
    }


def mixed(p, backwards):
    x, z = p["xz"].double().chunk(2, 1)
    x = loops.conv(x, p["conv"][:, 0], p["conv_bias"], True)
    rows = torch.einsum("rd,bdl->brl", p["x_proj"].double(), x)
    delta = torch.einsum("dr,brl->bdl", p["dt_proj"].double(), rows[:, :2])
    tensors = [x, delta, rows[:, 2 : 2 + N_], rows[:, -N_:], z]
    rest = {"D": p["D"], "delta_bias": p["delta_bias"], "delta_softplus": True}
    y = loops.scan(x, delta, p["A"], *tensors[2:4], z=z, **rest)[0]
    if backwards:
        x, delta, B, C, z = (t.flip(-1) for t in tensors)
        y = y + loops.scan(x, delta, p["A_b"], B, C, z=z, **rest)[0].flip(-1)
    return y


@pytest.mark.parametrize("bias", [True, False])
def test_inner_functions(bias):
    p = mixer(bias)
    first = [p[name] for name in ("xz", "conv", "conv_bias", "x_proj", "dt_proj")]
    out = [p["out_proj"], p["out_bias"]]

    def projected(y):
        y = torch.einsum("od,bdl->blo", p["out_proj"].double(), y)
        return y if not bias else y + p["out_bias"]

    rest = {"delta_bias": p["delta_bias"], "delta_softplus": True}
    close(mamba_inner_fn_no_out_proj(*first, p["A"], None, None, p["D"], **rest), mixed(p, False))
    close(mamba_inner_fn(*first, *out, p["A"], None, None, p["D"], **rest), projected(mixed(p, False)))
    ours = bimamba_inner_fn(*first, *out, p["A"], p["A_b"], None, None, p["D"], **rest)
    close(ours, projected(mixed(p, True)))


def test_norms_of_what_is_projected():
    p = mixer(True)
    weights = {name: torch.randn(size) for name, size in (("b", N_), ("c", N_), ("dt", D_))}
    y = mamba_inner_fn(
        *(p["xz"], p["conv"], p["conv_bias"], p["x_proj"], p["dt_proj"], p["out_proj"], p["out_bias"], p["A"]),
        D=p["D"],
        delta_bias=p["delta_bias"],
        **{f"{name}_rms_weight": weight for name, weight in weights.items()},
        b_c_dt_rms_eps=0.1,
    )
    x, z = p["xz"].double().chunk(2, 1)
    x = loops.conv(x, p["conv"][:, 0], p["conv_bias"], True)
    rows = torch.einsum("rd,bdl->brl", p["x_proj"].double(), x)
    projected = {"dt": torch.einsum("dr,brl->bdl", p["dt_proj"].double(), rows[:, :2])}
    projected |= {"b": rows[:, 2 : 2 + N_], "c": rows[:, -N_:]}
    dt, B, C = (
        projected[name] / (projected[name].square().mean(1, keepdim=True) + 0.1).sqrt() * weights[name].view(-1, 1)
        for name in ("dt", "b", "c")
    )
    scanned = loops.scan(x, dt, p["A"], B, C, p["D"], z, p["delta_bias"], True)[0]
    close(y, torch.einsum("od,bdl->blo", p["out_proj"].double(), scanned) + p["out_bias"])


@pytest.mark.parametrize("kept", [True, False])
def test_a_state_before_the_first_token(kept):
    l = 2 * 2048 + 100 if kept else L_
    p = {name: t.detach() for name, t in inputs(l=l).items()}
    fwd, bwd = raw_scan.SelectiveScan.fwd, raw_scan.SelectiveScan.bwd
    whole, x, gated = fwd(*p.values(), True, None)
    cut = l // 2
    parts = [{name: t[..., s] if t.dim() == 3 else t for name, t in p.items()} for s in (slice(cut), slice(cut, None))]
    state = fwd(*parts[0].values(), True)[1][:, :, -1, 1::2]
    tensors = {name: t.clone().requires_grad_(kept) for name, t in parts[1].items()}
    out, last, out_z = fwd(*tensors.values(), True, state)
    close(out, whole[..., cut:].double(), 1e-4)
    close(out_z, gated[..., cut:].double(), 1e-4)
    close(last[:, :, -1, 1::2], x[:, :, -1, 1::2].double(), 1e-4)
    # of the tokens behind the cut, the whole sequence has the same gradient
    dout = torch.zeros_like(whole)
    dout[..., cut:] = torch.linspace(-1, 1, l - cut)
    ddelta = bwd(*p.values(), dout, x, whole, None, True, False)[1][..., cut:]  # of u it does not depend on the state
    given = [t.detach() for t in tensors.values()]
    close(bwd(*given, dout[..., cut:], last, out, None, True, False, state)[1], ddelta.double(), 1e-4)
    with pytest.raises(ValueError, match=r"the state must be \(b, d, n\)"):
        fwd(*p.values(), True, state[..., :-1])


def test_a_backend_that_keeps_nothing_before_the_gate():
    tensors = {name: t.detach().double() for name, t in inputs().items()}
    tensors["B"], tensors["C"] = tensors["B"].unsqueeze(1), tensors["C"].unsqueeze(1)
    out, x, gated = raw_scan.SelectiveScan.fwd(**tensors, delta_softplus=True)
    expected = loops.scan(**tensors, delta_softplus=True)
    for ours, theirs, tolerance in zip((gated, out, x[:, :, -1, 1::2]), expected, (1e-12, 1e-12, 1e-6), strict=True):
        close(ours, theirs, tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_oflex_loses_no_digits_of_its_float32(dtype):
    tensors = {name: t.detach() for name, t in inputs("(b,g,n,l)", "(b,g,n,l)", dtype=dtype).items()}
    del tensors["z"]
    tensors["u"] *= 1e4
    tensors["D"] *= 10  # the output is beyond float16
    out, _ = raw_scan.Oflex.fwd(*tensors.values(), True, 1, True)
    close(out, loops.scan(**tensors, delta_softplus=True)[0])


def test_rows_of_the_first_build():
    *tensors, z, bias = (t.detach() for t in inputs().values())
    fwd = raw_scan.SelectiveScan.fwd
    torch.testing.assert_close(fwd(*tensors, z, bias, True, 1), fwd(*tensors, z, bias, True))


def test_arguments_of_the_first_builds():
    p = inputs(z=False)
    *tensors, _, bias = p.values()
    expected = loops.scan(**p, delta_softplus=True)[0]
    close(core_scan_fn(*tensors, bias, True, 2), expected)
    close(core_scan_fn(*tensors, delta_bias=bias, delta_softplus=True, nrows=2), expected)
    close(core_scan_fn(*tensors, delta_bias=bias, delta_softplus=True, z=None, return_last_state=False), expected)
    out, x = raw_scan.Core.fwd(*tensors, bias, True)
    close(out, expected)
    theirs = torch.autograd.grad(expected.sum(), [*tensors, bias])
    for one, other in zip(raw_scan.Core.bwd(*tensors, bias, torch.ones_like(out), x, None, True), theirs, strict=True):
        close(one, other.double(), 1e-4)


def test_gradients_have_the_dtypes_of_their_tensors():
    u, delta, A, B, C, D, _, bias = (t.detach().double() for t in inputs().values())
    tensors = u, delta, A, B, C, D.float(), None, bias.float()
    out, x = raw_scan.SelectiveScan.fwd(*tensors, True)
    grads = raw_scan.SelectiveScan.bwd(*tensors, out, x, out, None, True, False)
    given = [t for t in tensors if t is not None]
    assert [grad.dtype for grad in grads] == [t.dtype for t in given]


@pytest.mark.parametrize("gated", [True, False])
def test_what_is_returned_may_be_changed_in_place(gated):
    p = inputs(z=gated)
    expected, weights = loops.scan(**p, delta_softplus=True)[0], torch.linspace(-1, 1, L_)
    y = selective_scan_fn(**p, delta_softplus=True)
    y += 1
    y *= 2
    close(y, 2 * (expected + 1))
    ours = torch.autograd.grad((y * weights).sum(), [t for t in p.values() if t is not None])
    theirs = torch.autograd.grad((2 * expected * weights).sum(), [t for t in p.values() if t is not None])
    for one, other in zip(ours, theirs, strict=True):
        close(one, other.double(), 1e-4)
