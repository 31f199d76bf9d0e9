"""The published Mamba-2 mixers: their parameters, and their outputs from the definition in float64."""

import pytest
import torch
import torch.nn.functional as F

from tests.compat import loops
from tests.compat.test_published_mixers import by_steps
from tests.compat.test_published_scan import close
from vim.compat.mamba2 import Mamba2, Mamba2Simple

SIZES = {"d_model": 16, "d_state": 8, "headdim": 8, "layer_idx": 0}
OPTIONS = {
    "upstream": {},
    "gate": {"rmsnorm": False},
    "groups": {"ngroups": 2},
    "skips": {"D_has_hdim": True},
    "mlp": {"d_ssm": 16, "rmsnorm": False},
    "no bias": {"conv_bias": False},
    "biases": {"bias": True, "norm_before_gate": True},
    "limits": {"dt_limit": (0.01, 0.03)},
}
KEYS = {"dt_bias", "A_log", "D", "in_proj.weight", "conv1d.weight", "conv1d.bias", "norm.weight", "out_proj.weight"}


def expected(module, x):
    weights = {key: value.double() for key, value in module.state_dict().items()}
    n, p, groups, heads, e = module.d_state, module.headdim, module.ngroups, module.nheads, module.d_ssm
    rows = F.linear(x.double(), weights["in_proj.weight"], weights.get("in_proj.bias"))
    extra = (rows.shape[-1] - 2 * e - 2 * groups * n - heads) // 2
    z0, x0, z, u, dt = rows.split([extra, extra, e, e + 2 * groups * n, heads], -1)
    u = loops.conv(u.transpose(1, 2), weights["conv1d.weight"][:, 0], weights.get("conv1d.bias"), True).transpose(1, 2)
    u, B, C = u.split([e, groups * n, groups * n], -1)
    dt = F.softplus(dt + weights["dt_bias"]).clamp(*module.dt_limit)
    B, C = (t.unflatten(-1, (groups, n)) for t in (B, C))
    D = weights["D"].view(heads, p) if module.D_has_hdim else weights["D"]
    state = weights["init_states"].expand(len(x), -1, -1, -1) if "init_states" in weights else None
    y = loops.ssd(u.unflatten(-1, (heads, p)), dt, -weights["A_log"].exp(), B, C, D, state=state)[0].flatten(2)
    gate = F.silu(z)
    if "norm.weight" in weights:
        y = y if module.norm_before_gate else y * gate
        groups_of = y.unflatten(-1, (groups, -1))
        y = (groups_of / (groups_of.square().mean(-1, keepdim=True) + 1e-5).sqrt()).flatten(2) * weights["norm.weight"]
        gate = gate if module.norm_before_gate else 1
    y = torch.cat([F.silu(z0) * x0, y * gate], -1)
    return F.linear(y, weights["out_proj.weight"], weights.get("out_proj.bias"))


@pytest.mark.parametrize("name", OPTIONS)
def test_mamba2(name):
    torch.manual_seed(0)
    module = Mamba2(**SIZES, **OPTIONS[name])
    x = torch.randn(2, 9, 16)
    y, theirs = module(x), expected(module, x)
    close(y, theirs)
    close(module(x.flatten(0, 1), seqlen=9), theirs.flatten(0, 1))
    close(by_steps(module, x, 4), theirs)
    y.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
    drop = {"norm.weight"} if not module.rmsnorm else set()
    drop |= {"conv1d.bias"} if module.conv1d.bias is None else set()
    extra = {"in_proj.bias", "out_proj.bias"} if name == "biases" else set()
    assert set(module.state_dict()) == KEYS - drop | extra
    n, e = module.ngroups * 8, module.d_ssm
    assert module.in_proj.weight.shape == (2 * 32 + 2 * n + module.nheads, 16)
    assert module.conv1d.weight.shape == (e + 2 * n, 1, 4)
    assert module.D.shape == ((e,) if module.D_has_hdim else (module.nheads,))


@pytest.mark.parametrize("options", [{}, {"learnable_init_states": True, "ngroups": 2, "activation": "silu"}], ids=str)
def test_mamba2_simple(options):
    torch.manual_seed(0)
    module = Mamba2Simple(**SIZES, **options)
    learned = {"init_states"} if options else set()
    assert set(module.state_dict()) == KEYS | learned
    if learned:
        torch.nn.init.normal_(module.init_states)
    x = torch.randn(2, 9, 16)
    close(module(x), expected(module, x))
    conv_state, ssm_state = module.allocate_inference_cache(2, 9)
    y = torch.cat([module.step(x[:, t : t + 1], conv_state, ssm_state)[0] for t in range(9)], 1)
    close(y, expected(module, x))
    module(x).sum().backward()
    assert all(p.grad is not None for p in module.parameters())
    assert Mamba2Simple(64).headdim == 128 and Mamba2Simple(64).d_state == 64


@pytest.mark.parametrize("options", [{"headdim": 5}, {"headdim": 64}, {"ngroups": 3}, {"d_ssm": 64}], ids=str)
def test_channels_that_are_no_heads_are_refused(options):
    with pytest.raises(ValueError, match="must be at most expand . d_model = 32, and heads of"):
        Mamba2(**{**SIZES, **options})


@pytest.mark.parametrize("options", [{"seq_idx": torch.zeros(1, 4)}, {"cu_seqlens": torch.zeros(2)}], ids=["a", "b"])
def test_several_sequences_in_one_are_refused(options):
    with pytest.raises(NotImplementedError, match="without seq_idx and cu_seqlens"):
        Mamba2(**SIZES)(torch.randn(1, 4, 16), **options)
