"""The published mixers: their parameters' names, and their outputs from the definition in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.compat import loops
from tests.compat.test_published_scan import close
from vim.compat.mamba import Block, Mamba
from vim.compat.norm import RMSNorm

KEYS = ["A_log", "D", "conv1d.bias", "conv1d.weight", "dt_proj.bias", "dt_proj.weight", "in_proj.weight"]
KEYS += ["out_proj.weight", "x_proj.weight"]
BACK = ["A_b_log", "D_b", "conv1d_b.bias", "conv1d_b.weight", "dt_proj_b.bias", "dt_proj_b.weight", "x_proj_b.weight"]
SLICES = [key.replace("_b", "_s", 1) for key in BACK]
OPTIONS = {
    "upstream": ({}, KEYS),
    "sizes": ({"d_state": 4, "d_conv": 3, "expand": 1, "dt_rank": 5}, KEYS),
    "biases": (
        {"conv_bias": False, "bias": True},
        [*(k for k in KEYS if k != "conv1d.bias"), "in_proj.bias", "out_proj.bias"],
    ),
    "v1": ({"bimamba_type": "v1"}, [*KEYS, "A_b_log"]),
    "v2": ({"bimamba_type": "v2", "if_devide_out": False}, KEYS + BACK),
    "half": ({"bimamba_type": "v2", "if_devide_out": True}, KEYS + BACK),
    "also half": ({"bimamba_type": "v2", "if_divide_out": True}, KEYS + BACK),
    "videomamba": ({"bimamba": True}, KEYS + BACK),
    "slices": ({"bimamba_type": "v3", "nslices": 3}, KEYS + BACK + SLICES),
    "scaled": ({"init_layer_scale": 0.1}, [*KEYS, "gamma"]),
}


def expected(module, x):
    """The mixer of the published code, in its layout."""
    weights = {key: value.double() for key, value in module.state_dict().items()}
    xz = F.linear(x.double(), weights["in_proj.weight"], weights.get("in_proj.bias")).transpose(1, 2)

    def scan(xz, end, A=None):
        u, z = xz.chunk(2, 1)
        u = loops.conv(u, weights[f"conv1d{end}.weight"][:, 0], weights.get(f"conv1d{end}.bias"), True)
        rows = torch.einsum("rd,bdl->brl", weights[f"x_proj{end}.weight"], u)
        r, n = module.dt_rank, module.d_state
        delta = torch.einsum("dr,brl->bdl", weights[f"dt_proj{end}.weight"], rows[:, :r])
        bias, D = weights[f"dt_proj{end}.bias"], weights[f"D{end}"]
        A = -weights[f"A{end}_log"].exp() if A is None else A
        tensors = [u, delta, rows[:, r : r + n], rows[:, r + n :], z]
        return tensors, lambda u, delta, B, C, z: loops.scan(u, delta, A, B, C, D, z, bias, True)[0]

    tensors, run = scan(xz, "")
    y = run(*tensors)
    if module.bimamba_type == "v1":
        _, back = scan(xz, "", -weights["A_b_log"].exp())
        y = y + back(*(t.flip(-1) for t in tensors)).flip(-1)
    if module.bimamba_type in ("v2", "v3"):
        tensors, run = scan(xz.flip(-1), "_b")
        y = y + run(*tensors).flip(-1)
    if module.bimamba_type == "v3":
        sliced = torch.stack(xz.chunk(module.nslices, -1), -1).flatten(-2)
        tensors, run = scan(sliced, "_s")
        y = y + run(*tensors).unflatten(-1, (-1, module.nslices)).transpose(-1, -2).flatten(-2)
    y = y / 2 if module.if_divide_out else y
    y = F.linear(y.transpose(1, 2), weights["out_proj.weight"], weights.get("out_proj.bias"))
    return y * weights["gamma"] if "gamma" in weights else y


@pytest.mark.parametrize("name", OPTIONS)
def test_mamba(name):
    options, keys = OPTIONS[name]
    torch.manual_seed(0)
    module = Mamba(16, layer_idx=3, **options)
    x = torch.randn(2, 12, 16)
    assert sorted(module.state_dict()) == sorted(keys)
    y = module(x)
    close(y, expected(module, x))
    y.sum().backward()
    assert all(p.grad is not None for p in module.parameters())
    assert module.A_log.dtype == torch.float32 and module.A_log._no_weight_decay and module.dt_proj.bias._no_reinit
    assert F.softplus(module.dt_proj.bias).min() >= 0.001 and F.softplus(module.dt_proj.bias).max() <= 0.1001


@pytest.mark.parametrize("options", [{"bimamba_type": "v3"}, {"bimamba_type": "v4"}, {"nslices": 5}], ids=str)
def test_types_that_forks_disagree_on(options):
    with pytest.raises(ValueError, match="different models in different forks"):
        Mamba(16, **options)


def test_generation_is_refused():
    with pytest.raises(NotImplementedError, match="whole sequences"):
        Mamba(16)(torch.randn(1, 4, 16), inference_params=object())


@pytest.mark.parametrize("norm_cls", [nn.LayerNorm, RMSNorm])
@pytest.mark.parametrize("mlp", [False, True])
def test_block(norm_cls, mlp):
    torch.manual_seed(0)
    halves = [lambda dim: nn.Linear(dim, dim)] if mlp else []
    block = Block(16, lambda dim: Mamba(dim), *halves, norm_cls, residual_in_fp32=True)
    x, residual = torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    y, total = block(x, residual)
    first = x + residual
    mixed = block.mixer(block.norm(first))
    if mlp:
        torch.testing.assert_close(total, first + mixed)
        torch.testing.assert_close(y, block.mlp(block.norm2(first + mixed)))
    else:
        torch.testing.assert_close(total, first)
        torch.testing.assert_close(y, mixed)


class Scaled(nn.Module):
    """A norm of a repository's own, which looks like an RMSNorm."""

    def __init__(self, dim):
        super().__init__()
        self.weight, self.bias, self.eps = nn.Parameter(torch.ones(dim)), None, 1.0

    def forward(self, x):
        return x * self.weight / 2


@pytest.mark.parametrize("norm_cls", [Scaled, nn.RMSNorm, nn.Identity], ids=lambda cls: cls.__name__)
def test_block_with_another_norm(norm_cls):
    block = Block(16, Mamba, norm_cls)
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(block(x), (block.mixer(block.norm(x)), x))
