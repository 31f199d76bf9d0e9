"""Convolutions, norms and Mamba-2's scan against their definitions in float64."""

import pytest
import torch
import torch.nn.functional as F

from tests.compat import loops
from tests.compat.test_published_scan import close
from vim.compat import norm, raw_conv
from vim.compat.conv import (
    causal_conv1d_fn,
    causal_conv1d_ref,
    causal_conv1d_update,
    causal_conv1d_varlen_states,
)
from vim.compat.ssd import (
    MambaChunkScanCombinedFn,
    MambaSplitConv1dScanCombinedFn,
    mamba_chunk_scan_combined,
    mamba_split_conv1d_scan_combined,
    selective_state_update,
    ssd_minimal_discrete,
)


def conv_inputs(l=9):
    torch.manual_seed(0)
    return torch.randn(2, 6, l), torch.randn(6, 4), torch.randn(6)


@pytest.mark.parametrize("activation", [None, "silu", "swish"])
def test_causal_conv1d_fn(activation):
    x, weight, bias = conv_inputs()
    silu = activation is not None
    expected = loops.conv(x, weight, bias, silu)
    close(causal_conv1d_fn(x, weight, bias, activation=activation), expected)
    close(causal_conv1d_fn(x, weight, bias, activation), expected)  # of version 1.0
    close(causal_conv1d_fn(x.transpose(1, 2).contiguous().transpose(1, 2), weight, None), loops.conv(x, weight))


@pytest.mark.parametrize("l", [2, 9])
def test_states_of_the_convolution(l):
    x, weight, bias = conv_inputs(l)
    before = torch.randn(2, 6, 3)
    y, last = causal_conv1d_fn(x, weight, bias, None, before, True, activation="silu")
    close(y, loops.conv(x, weight, bias, True, before))
    torch.testing.assert_close(last, torch.cat([before, x], 2)[..., -3:])
    out = torch.empty(2, 6, 3)
    assert causal_conv1d_fn(x, weight, bias, None, None, True, out)[1] is out
    torch.testing.assert_close(out, F.pad(x, (3, 0))[..., -3:])


def test_what_the_convolution_refuses():
    x, weight, bias = conv_inputs()
    with pytest.raises(ValueError, match="seq_idx goes without initial_states"):
        causal_conv1d_fn(x, weight, bias, torch.zeros(2, 9, dtype=torch.int32), return_final_states=True)
    with pytest.raises(ValueError, match="activation must be"):
        causal_conv1d_fn(x, weight, bias, activation="gelu")
    with pytest.raises(ValueError, match=r"initial_states must be \(b, d, w - 1\) = \(2, 6, 3\), got \(2, 6, 2\)"):
        causal_conv1d_fn(x, weight, bias, initial_states=torch.zeros(2, 6, 2))
    with pytest.raises(ValueError, match=r"conv_state must be \(b, d, >= w - 1\) = \(2, 6, 3\), got \(2, 6, 2\)"):
        causal_conv1d_update(x[:, :, 0], torch.zeros(2, 6, 2), weight, bias)
    with pytest.raises(ValueError, match=r"weight must be \(d, w\) = \(6, 4\), got \(6, 1, 4\)"):
        causal_conv1d_fn(x, weight.unsqueeze(1), bias)
    for wrong, got in ((x.long(), r"\(2, 6, 9\), torch.int64"), (x[:0], r"\(0, 6, 9\)")):
        with pytest.raises(ValueError, match=rf"x must be \(b, d, l\), not empty, floating point, got {got}"):
            causal_conv1d_fn(wrong, weight, bias)
    with pytest.raises(TypeError, match="takes 4, 5, 7 or 8 arguments, got 6"):
        raw_conv.causal_conv1d_fwd(x, weight, bias, None, None, True)


def test_update_is_the_sequence():
    x, weight, bias = conv_inputs()
    expected = loops.conv(x, weight, bias, True)
    state = torch.zeros(2, 6, 5)
    got = [causal_conv1d_update(x[..., t], state, weight, bias, "silu") for t in range(5)]
    got = torch.stack(got, 2)
    close(torch.cat([got, causal_conv1d_update(x[..., 5:], state, weight, bias, "silu")], 2), expected)
    state = torch.zeros(2, 6, 3)
    close(raw_conv.causal_conv1d_update_raw(x[..., 0], state, weight, bias, True), expected[..., 0])
    out = torch.empty(2, 6)
    assert raw_conv.causal_conv1d_update_raw(x[..., 1], state, weight, bias, out, True, None, None) is None
    close(out, expected[..., 1])


SEQUENCES = torch.tensor([[0, 0, 0, 0, 1, 1, 2, -1, -1], [4, 5, 5, 5, 5, 5, 5, 5, 6]])


def test_sequences_side_by_side():
    x, weight, bias = (t.requires_grad_() for t in conv_inputs())
    expected = torch.zeros(2, 6, 9, dtype=torch.float64)
    for row, ids in enumerate(SEQUENCES):
        for index in ids[ids >= 0].unique():
            own = ids == index
            expected[row, :, own] = loops.conv(x[row : row + 1, :, own], weight, bias, True)[0]
    y = causal_conv1d_fn(x, weight, bias, SEQUENCES, activation="silu")
    close(y, expected)
    dout = torch.randn(2, 6, 9)
    theirs = torch.autograd.grad((expected * dout).sum(), [x, weight, bias])
    for one, other in zip(torch.autograd.grad(y, [x, weight, bias], dout), theirs, strict=True):
        close(one, other.double())
    x, weight, bias = (t.detach() for t in (x, weight, bias))
    dx, out = torch.empty_like(x), torch.empty_like(x)
    for one, other in zip(raw_conv.causal_conv1d_bwd(x, weight, bias, dout, SEQUENCES, dx, True), theirs, strict=True):
        close(one, other.double())
    raw_conv.causal_conv1d_fwd(x, weight, bias, SEQUENCES, None, out, None, True)
    close(out, expected.detach())
    given = [dx.zero_(), torch.empty_like(weight), torch.empty_like(bias), None]
    assert raw_conv.causal_conv1d_bwd(x, weight, bias, dout, SEQUENCES, None, None, *given, True) is None
    for one, other in zip(given, theirs, strict=False):
        close(one, other.double())


@pytest.mark.parametrize("seen", [None, [0, 7]], ids=["shifted", "ring"])
def test_updates_of_rows_of_a_state(seen):
    x, weight, bias = conv_inputs(5)
    counts = None if seen is None else torch.tensor(seen)
    known, states = torch.randn(2, 6, 4), torch.randn(5, 6, 4)
    for row, at in ((0, 3), (1, 1)):  # the rows of states that hold what is known
        shift = 0 if seen is None else seen[row]
        states[at] = known[row].roll(shift, 1)  # token t of a ring is at t modulo its length
    kept = states.clone()
    rows = torch.tensor([3, -1, 1], dtype=torch.int32)
    three = torch.stack([x[0], x[0], x[1]])
    if counts is not None:
        counts = torch.tensor([seen[0], 5, seen[1]], dtype=torch.int32)
    y = causal_conv1d_update(three, states, weight, bias, "silu", counts, rows)
    close(y[::2], loops.conv(x, weight, bias, True, known[..., 1:]))
    assert not y[1].any()
    torch.testing.assert_close(states[[0, 2, 4]], kept[[0, 2, 4]])
    last = torch.cat([known, x], 2)[..., -4:]
    for row, at in ((0, 3), (1, 1)):
        shift = 0 if seen is None else seen[row] + 5
        torch.testing.assert_close(states[at].roll(-shift, 1), last[row])


def test_states_of_sequences_one_after_the_other():
    x = torch.randn(9, 6)
    states = causal_conv1d_varlen_states(x, torch.tensor([0, 2, 9]), 4)
    torch.testing.assert_close(states, torch.stack([F.pad(x[:2].T, (2, 0)), x[5:].T]))


FORWARD = {4: (), 5: (None,), 7: (None, None, None)}


@pytest.mark.parametrize("count", [4, 5, 7, 8])
def test_raw_convolution_of_each_version(count):
    x, weight, bias = conv_inputs()
    expected = loops.conv(x, weight, bias, True)
    if count < 8:
        close(raw_conv.causal_conv1d_fwd(x, weight, bias, *FORWARD[count], True), expected)
        return
    out, before, last = torch.empty_like(x), torch.randn(2, 6, 3), torch.empty(2, 6, 3)
    assert raw_conv.causal_conv1d_fwd(x, weight, bias, None, before, out, last, True) is None
    close(out, loops.conv(x, weight, bias, True, before))
    torch.testing.assert_close(last, x[..., -3:])


@pytest.mark.parametrize("given", [True, False], ids=["dx given", "no dx"])
@pytest.mark.parametrize("count", [6, 7, 10, 12])
def test_raw_gradients_of_each_version(count, given):
    x, weight, bias = (t.requires_grad_() for t in conv_inputs())
    before = torch.randn(2, 6, 3, requires_grad=True) if count > 7 else None
    y = loops.conv(x, weight, bias, True, before)
    dout, dlast = torch.randn(y.shape), torch.randn(2, 6, 3) if count > 7 else None
    loss = (y * dout).sum()
    if count > 7:
        loss = loss + (torch.cat([before, x], 2)[..., -3:] * dlast).sum()
    theirs = torch.autograd.grad(loss, [x, weight, bias, *([before] if count > 7 else [])])
    x, weight, bias = (t.detach() for t in (x, weight, bias))
    both = torch.full((2, 12, 9), torch.nan)
    dx = both[:, 6:] if given else None
    if count <= 7:
        ours = raw_conv.causal_conv1d_bwd(x, weight, bias, dout, *([None] if count == 7 else []), dx, True)
    elif count == 10:
        ours = raw_conv.causal_conv1d_bwd(x, weight, bias, dout, None, before.detach(), dlast, dx, True, True)
    else:
        dx = both[:, 6:]
        ours = [dx, torch.empty_like(weight), torch.empty_like(bias), torch.empty(2, 6, 3)]
        assert raw_conv.causal_conv1d_bwd(x, weight, bias, dout, None, before.detach(), dlast, *ours, True) is None
    for one, other in zip(ours, theirs, strict=False):
        close(one, other.double())
    if dx is not None:
        close(both[:, 6:], theirs[0].double())


@pytest.mark.parametrize("rms", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("residual", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("in_fp32", [True, False])
def test_norms_with_a_residual(rms, dtype, residual, in_fp32):
    torch.manual_seed(0)
    x, weight = torch.randn(2, 5, 8).to(dtype), torch.randn(8)
    bias = None if rms else torch.randn(8)
    other = None if residual is None else torch.randn(2, 5, 8).to(residual)
    options = {"prenorm": True, "residual_in_fp32": in_fp32, "eps": 1e-5}
    y, kept = (
        norm.rms_norm_fn(x, weight, bias, other, **options)
        if rms
        else norm.layer_norm_fn(x, weight, bias, other, **options)
    )
    total = x.double() if other is None else x.double() + other.double()
    assert y.dtype == dtype
    assert kept.dtype == (residual or (torch.float32 if in_fp32 else dtype))
    close(kept, total, 0.01 if kept.dtype == torch.bfloat16 else 1e-6)
    if rms:
        expected = total / (total.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    else:
        expected = F.layer_norm(total, (8,), weight.double(), bias.double(), 1e-5)
    close(y, expected, 0.01 if dtype == torch.bfloat16 else 1e-5)


def normalised(total, weight, bias, rms, eps=1e-6):
    total = total if rms else total - total.mean(-1, keepdim=True)
    y = total / (total.square().mean(-1, keepdim=True) + eps).sqrt() * weight
    return y if bias is None else y + bias


@pytest.mark.parametrize("rms", [True, False])
@pytest.mark.parametrize("second", [True, False], ids=["parallel", "one"])
def test_norms_of_version_2(rms, second):
    torch.manual_seed(0)
    x, x1, residual = torch.randn(3, 2, 5, 8).double()
    weight, bias, weight1, bias1 = torch.randn(4, 8).double()
    rowscale = None if second else torch.rand(2, 5).double()
    extra = (x1, weight1, bias1) if second else (None, None, None)
    run = norm.rms_norm_fn if rms else norm.layer_norm_fn
    flags = (True,) if rms else (False, True)  # is_rms_norm, return_dropout_mask
    options = (*extra, 1e-6, 0.25, rowscale, True, False, *flags)
    y, *more, total, mask, mask1 = run(x, weight, bias, residual, *options)
    expected = (x if second else x * rowscale.unsqueeze(-1)) * mask / 0.75 + residual
    expected = expected + x1 * mask1 / 0.75 if second else expected
    assert 0.6 < mask.double().mean() < 0.9 and mask.dtype == torch.bool and (mask1 is None) != second
    close(total, expected)
    close(y, normalised(expected, weight, bias, rms))
    assert len(more) == second
    if second:
        close(more[0], normalised(expected, weight1, bias1, rms))


def test_arguments_of_norms_in_the_order_of_version_1():
    torch.manual_seed(0)
    x, residual = torch.randn(2, 2, 8)
    weight, bias = torch.randn(2, 8)
    expected = x.double() + residual.double()
    y, total = norm.layer_norm_fn(x, weight, bias, residual, 0.1, True, False, True)
    close(y, normalised(expected, weight, bias, True, 0.1))
    close(total, expected)
    y, total = norm.rms_norm_fn(x, weight, bias, residual, True, False, 0.1)
    close(y, normalised(expected, weight, bias, True, 0.1))
    close(norm.layer_norm_fn(x, weight, bias, residual, 0.1), normalised(expected, weight, bias, False, 0.1))
    with pytest.raises(TypeError, match="rms_norm_fn takes up to 7 arguments, got 8"):
        norm.rms_norm_fn(x, weight, bias, residual, True, False, 0.1, True)
    with pytest.raises(ValueError, match="x1 must be None"):
        norm.layer_norm_fn(x, weight, bias, x1=x, rowscale=torch.ones(2))


@pytest.mark.parametrize("rms", [True, False])
def test_references_of_norms(rms):
    torch.manual_seed(0)
    x, residual = torch.randn(2, 2, 8).bfloat16()
    weight, bias = torch.randn(2, 8)
    reference = norm.rms_norm_ref if rms else norm.layer_norm_ref
    total = x.double() + residual.double()
    for args in ((0.1, True, True), (None, None, None, 0.1, 0.0, None, True, None, None, True)):
        y, summed = reference(x, weight, bias, residual, *args)
        assert (y.dtype, summed.dtype) == (torch.bfloat16, torch.float32)
        close(y, normalised(total, weight, bias, rms, 0.1), 1e-2)
        close(summed, total)
    assert reference(x, weight, bias, prenorm=True, upcast=True)[1].dtype == torch.float32
    assert reference(x, weight, bias, residual, prenorm=True)[1].dtype == torch.bfloat16
    with pytest.raises(NotImplementedError, match="without a dropout_mask"):
        reference(x, weight, bias, dropout_p=0.5, dropout_mask=x > 0)
    gated = norm.gated_rms_norm_ref(x, weight, bias, residual, 0.1, None, True, False)
    torch.testing.assert_close(gated, norm.rmsnorm_fn(x, weight, bias, residual, 0.1))


def test_the_reference_of_the_convolution():
    x, weight, bias = conv_inputs()
    before = torch.randn(2, 6, 3)
    y, last = causal_conv1d_ref(x, weight, bias, before, True, None, "silu")
    close(y, loops.conv(x, weight, bias, True, before))
    torch.testing.assert_close(last, x[..., -3:])
    close(causal_conv1d_ref(x, weight, bias, "silu"), loops.conv(x, weight, bias, True))  # of version 1.0


@pytest.mark.parametrize("options", [("cpu", torch.float64), ("cpu",), (torch.device("cpu"),), (None, torch.float64)])
def test_the_norm_module_of_version_1(options):
    module = norm.RMSNorm(8, 0.1, *options)
    assert module.drop is None and module.weight.device.type == "cpu"
    assert module.weight.dtype == (options[1] if len(options) > 1 else torch.float32)


def test_the_norm_module():
    torch.manual_seed(0)
    x, residual = torch.randn(2, 3, 8)
    module = norm.RMSNorm(8, 0.1, 0.5, dtype=torch.float32)
    assert module.bias is None and list(module.state_dict()) == ["weight"] and module.eps == 0.1
    torch.nn.init.normal_(module.weight)
    total = module(x.bfloat16(), residual_in_fp32=True, prenorm=True)[1]
    assert total.dtype == torch.float32 and (total == 0).any()
    y, total = module.eval()(x, residual, prenorm=True)
    close(y, normalised(x.double() + residual, module.weight.double(), None, True, 0.1))
    module.reset_parameters()
    assert module.weight.tolist() == [1] * 8


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("group", [None, 4])
@pytest.mark.parametrize("kind", [norm.GatedRMSNorm, norm.GatedLayerNorm])
def test_gated_norms(kind, group, before):
    torch.manual_seed(0)
    x, z, module = torch.randn(2, 5, 8), torch.randn(2, 5, 8), kind(8, 1e-5, group, before)
    torch.nn.init.normal_(module.weight)
    y = x.double() if before else x.double() * F.silu(z.double())
    rows = y.unflatten(-1, (-1, group or 8))
    if kind is norm.GatedLayerNorm:
        torch.nn.init.normal_(module.bias)
        rows = rows - rows.mean(-1, keepdim=True)
    y = (rows / (rows.square().mean(-1, keepdim=True) + 1e-5).sqrt()).flatten(-2) * module.weight
    y = y if module.bias is None else y + module.bias
    close(module(x, z), y * F.silu(z.double()) if before else y)


def ssd_inputs(groups=2):
    torch.manual_seed(0)
    return {
        "x": torch.randn(2, 7, 4, 3),
        "dt": torch.randn(2, 7, 4),
        "A": -torch.rand(4),
        "B": torch.randn(2, 7, groups, 5),
        "C": torch.randn(2, 7, groups, 5),
    }


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("D", [None, (4,), (4, 3)], ids=str)
def test_chunk_scan(groups, D):
    p = ssd_inputs(groups)
    D, z = None if D is None else torch.randn(D), torch.randn(2, 7, 4, 3)
    state, bias = torch.randn(2, 4, 3, 5), torch.randn(4)
    options = {"dt_bias": bias, "dt_softplus": True, "dt_limit": (0.1, 1.5), "initial_states": state}
    y, last = mamba_chunk_scan_combined(**p, chunk_size=4, D=D, z=z, return_final_states=True, **options)
    dt = F.softplus(p["dt"].double() + bias).clamp(0.1, 1.5)
    expected, end = loops.ssd(**{**p, "dt": dt}, D=D, z=z, state=state)
    close(y, expected)
    close(last, end)
    with pytest.raises(NotImplementedError, match="seq_idx"):
        mamba_chunk_scan_combined(**p, chunk_size=4, seq_idx=torch.zeros(2, 7))
    with pytest.raises(ValueError, match=r"x must be \(b, l, h, p\), not empty, got \(0, 7, 4, 3\)"):
        mamba_chunk_scan_combined(**{**p, "x": p["x"][:0]}, chunk_size=4)


@pytest.mark.parametrize("given", [(None, True), (True,)], ids=["2.2", "2.0"])
def test_autograd_functions_of_mamba2(given):
    p = ssd_inputs()
    given = (*p.values(), 4, None, None, None, None, None, *given, (0.1, 1.5), True)
    y, last = MambaChunkScanCombinedFn.apply(*given)
    expected, end = loops.ssd(**{**p, "dt": F.softplus(p["dt"].double()).clamp(0.1, 1.5)})
    close(y, expected)
    close(last, end)
    assert MambaSplitConv1dScanCombinedFn.apply is mamba_split_conv1d_scan_combined


@pytest.mark.parametrize("rmsnorm", [True, False])
@pytest.mark.parametrize("extra", [0, 2])
def test_split_conv_scan(rmsnorm, extra):
    p, n, width = ssd_inputs(2), 5, 12 + 2 * 2 * 5
    zxbcdt = torch.randn(2, 7, 2 * extra + 12 + width + 4)
    conv, bias, dt_bias, D = torch.randn(width, 4), torch.randn(width), torch.randn(4), torch.randn(4)
    weight, out = torch.randn(12) if rmsnorm else None, torch.randn(6, extra + 12)
    y = mamba_split_conv1d_scan_combined(
        *(zxbcdt, conv, bias, dt_bias, p["A"], D, 4),
        rmsnorm_weight=weight,
        rmsnorm_eps=1e-5,
        outproj_weight=out,
        headdim=3,
        ngroups=2,
        norm_before_gate=False,
    )
    z0, x0, z, xbc, dt = zxbcdt.double().split([extra, extra, 12, width, 4], -1)
    xbc = loops.conv(xbc.transpose(1, 2), conv, bias, True).transpose(1, 2)
    x, B, C = xbc.split([12, 2 * n, 2 * n], -1)
    dt = F.softplus(dt + dt_bias)
    x, B, C = x.unflatten(-1, (4, 3)), B.unflatten(-1, (2, n)), C.unflatten(-1, (2, n))
    expected = loops.ssd(x, dt, p["A"], B, C, D)[0].flatten(2) * F.silu(z)
    if rmsnorm:
        rows = expected.unflatten(-1, (2, 6))
        expected = (rows / (rows.square().mean(-1, keepdim=True) + 1e-5).sqrt()).flatten(-2) * weight
    close(y, torch.cat([F.silu(z0) * x0, expected], -1) @ out.double().T)


def test_blocks_of_values_that_hold_their_steps():
    p, state = ssd_inputs(4), torch.randn(2, 4, 3, 5)
    values, decays = p["x"] * p["dt"].unsqueeze(-1), p["dt"] * p["A"]
    y, last = ssd_minimal_discrete(values, decays, p["B"], p["C"], 3, state.unsqueeze(1))
    expected, end = loops.ssd(**p, state=state)
    close(y, expected)
    close(last, end)


def test_one_step_of_rows_of_a_state():
    torch.manual_seed(0)
    u, dt, A, B, C = *torch.randn(2, 2, 6), -torch.rand(6, 3), *torch.randn(2, 2, 3)
    states = torch.randn(5, 6, 3)
    rows, kept, own = torch.tensor([3, 1], dtype=torch.int32), states.clone(), states[[3, 1]]
    y = selective_state_update(states, u, dt, A, B, C, state_batch_indices=rows)
    close(y, selective_state_update(own, u, dt, A, B, C).double())
    torch.testing.assert_close(states, kept.index_copy(0, rows.long(), own))


def test_one_step_of_a_scan():
    p = ssd_inputs()
    expected, end = loops.ssd(**p)
    state = torch.zeros(2, 4, 3, 5)
    for t in range(7):
        dt = p["dt"][:, t, :, None].expand(2, 4, 3)
        A = p["A"].view(4, 1, 1).expand(4, 3, 5)
        y = selective_state_update(state, p["x"][:, t], dt, A, p["B"][:, t], p["C"][:, t])
        close(y, expected[:, t])
    close(state, end)
    u, delta, A, B, C, z = *torch.randn(2, 2, 6), -torch.rand(6, 3), *torch.randn(2, 2, 3), torch.randn(2, 6)
    D, bias, state = torch.randn(6), torch.randn(6), torch.zeros(2, 6, 3)
    y = selective_state_update(state, u, delta, A, B, C, D, z, bias, True)
    tokens = [t.unsqueeze(-1) for t in (u, delta)]
    close(y, loops.scan(*tokens, A, B.unsqueeze(-1), C.unsqueeze(-1), D, z.unsqueeze(-1), bias, True)[0][..., 0])


@pytest.mark.parametrize("name", ["causal_conv1d_fwd", "causal_conv1d_bwd", "causal_conv1d_update_raw"])
def test_too_few_arguments_are_counted(name):
    with pytest.raises(TypeError, match="arguments, got 1"):
        getattr(raw_conv, name)(torch.zeros(1))
