"""The published mixers: their parameters' names, and their outputs from the definition in float64."""

import copy
import io
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vim.compat
from tests.compat import loops
from tests.compat.test_install import clean  # noqa: F401
from tests.compat.test_published_scan import close
from vim.compat.block import Block, GatedMLP, create_block, init_weights
from vim.compat.language import InferenceParams
from vim.compat.mamba import Mamba
from vim.compat.mamba2 import Mamba2, Mamba2Simple
from vim.compat.norm import RMSNorm
from vim.compat.video_mamba_suite import HalvedMamba, ScanNormMamba

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


def by_steps(module, x, first):
    """Run a module on the first tokens, and then token by token."""
    params = InferenceParams(max_seqlen=x.shape[1], max_batch_size=len(x))
    ys = [module(x[:, :first], inference_params=params)]
    for t in range(first, x.shape[1]):
        params.seqlen_offset = t
        ys.append(module(x[:, t : t + 1], inference_params=params))
    return torch.cat(ys, 1)


@pytest.mark.parametrize("first", [1, 2, 7])
@pytest.mark.parametrize("name", ["upstream", "sizes", "biases", "scaled"])
def test_token_by_token_is_the_whole_sequence(name, first):
    torch.manual_seed(0)
    module = Mamba(16, layer_idx=3, **OPTIONS[name][0])
    nn.init.normal_(module.D)
    x = torch.randn(2, 9, 16)
    close(by_steps(module, x, first), expected(module, x))


def test_states_before_the_first_token():
    module = Block(16, lambda dim: Mamba(dim, d_state=4, d_conv=3))
    conv_state, ssm_state = module.allocate_inference_cache(2, 100, dtype=torch.float64)
    assert conv_state.shape == (2, 32, 3) and ssm_state.shape == (2, 32, 4) and ssm_state.dtype == torch.float64
    assert not conv_state.any() and not ssm_state.any()
    x = torch.randn(2, 9, 16)
    y = [module.mixer.step(x[:, t : t + 1], conv_state, ssm_state)[0] for t in range(9)]
    close(torch.cat(y, 1), expected(module.mixer, x))


def test_what_generation_refuses():
    x, params = torch.randn(1, 1, 16), InferenceParams(4, 1)
    for options in ({"bimamba_type": "v1"}, {"bimamba": True}):
        module = Mamba(16, layer_idx=0, **options)
        for call in (lambda m=module: m(x, params), lambda m=module: m.step(x, None, None)):
            with pytest.raises(NotImplementedError, match="also scans backwards, so it takes whole sequences"):
                call()
    with pytest.raises(ValueError, match="Mamba keeps its states by layer_idx, which is None"):
        Mamba(16)(x, inference_params=params)
    with pytest.raises(ValueError, match=r"one token, \(b, 1, d\), got \(1, 3, 16\)"):
        Mamba(16).step(torch.randn(1, 3, 16), *Mamba(16).allocate_inference_cache(1, 3))


def test_a_second_sequence_is_of_another_fork():
    x = torch.randn(1, 4, 16)
    with pytest.raises(ValueError, match="takes one sequence, got two: put the repository's own mamba_ssm"):
        Mamba(16)(x, x)
    torch.testing.assert_close(Mamba.forward(module := Mamba(16), x, None, 8), module(x))


def test_attributes_that_programs_read():
    module = Mamba(16, bimamba_type="v2", if_devide_out=True, init_layer_scale=0.5, layer_idx=2)
    read = ("bimamba_type", "if_devide_out", "if_divide_out", "init_layer_scale", "d_inner", "dt_rank", "layer_idx")
    assert [getattr(module, name) for name in read] == ["v2", True, True, 0.5, 32, 1, 2]
    assert (module.activation, module.use_fast_path, module.bimamba) == ("silu", True, False)
    assert Mamba(16, bimamba=True).bimamba and not hasattr(Mamba(16), "gamma")


PUBLISHED = {
    "upstream": ({}, []),
    "Vim": ({"bimamba_type": "v2", "if_devide_out": True, "init_layer_scale": 0.5}, ["if_divide_out"]),
    "Vim's v1": ({"bimamba_type": "v1"}, []),
    "Vim, halved by another name": ({"bimamba_type": "v2", "if_divide_out": True}, ["if_devide_out"]),
    "VideoMamba": ({"bimamba": True}, ["bimamba_type"]),
    "SegMamba": ({"bimamba_type": "v3", "nslices": 3}, ["bimamba"]),
}


def unpickled(module, monkeypatch, absent):
    """Pickle a module by the name of a published class, without attributes that it lacks, and load it."""
    vim.compat.install()
    for each in module.modules():
        for attribute in absent:
            each.__dict__.pop(attribute, None)
    for kind, source in (
        (Mamba, "mamba_simple"),
        (Mamba2, "mamba2"),
        (Mamba2Simple, "mamba2_simple"),
        (Block, "block"),
    ):
        monkeypatch.setattr(kind, "__module__", f"mamba_ssm.modules.{source}")
    monkeypatch.setattr(RMSNorm, "__module__", "mamba_ssm.ops.triton.layer_norm")
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_pickled_mixer(name, monkeypatch, clean):  # noqa: F811
    options, absent = PUBLISHED[name]
    torch.manual_seed(0)
    ours, x = Mamba(16, **options), torch.randn(2, 12, 16)
    wanted = expected(ours, x)
    own = {"if_divide_out", "if_devide_out", "bimamba", "nslices", "bimamba_type", "init_layer_scale"}
    theirs = unpickled(ours, monkeypatch, [*absent, *(own - options.keys())])
    close(theirs(x), wanted)
    close(copy.deepcopy(theirs)(x), wanted)


def test_a_pickled_mixer_of_a_fork_that_disagrees(monkeypatch, clean):  # noqa: F811
    ours = Mamba(16, bimamba_type="v3", nslices=3)
    with pytest.raises(ValueError, match="different models in different forks"):
        unpickled(ours, monkeypatch, ["if_divide_out", "nslices"])


@pytest.mark.parametrize("kind", [HalvedMamba, ScanNormMamba])
def test_copies_of_mixers_in_two_directions(kind):
    module, x = kind(16, bimamba_type="v2", if_devide_out=True), torch.randn(2, 9, 16)
    torch.testing.assert_close(copy.deepcopy(module)(x), module(x))


@pytest.mark.parametrize("mixer", [Mamba, Mamba2, Mamba2Simple])
def test_a_pickled_block(mixer, monkeypatch, clean):  # noqa: F811
    torch.manual_seed(0)
    options = {"norm_cls": RMSNorm, "fused_add_norm": True}
    ours = Block(16, partial(mixer, **({} if mixer is Mamba else {"headdim": 8})), **options)
    x = torch.randn(2, 6, 16)
    wanted = [*ours(x), ours.norm(x)]
    absent = ["mlp", "layer_idx", "drop", "if_divide_out", "bimamba_type", "bimamba", "nslices", "init_layer_scale"]
    if mixer is Mamba2Simple:
        absent += ["d_ssm", "D_has_hdim", "rmsnorm", "process_group"]
    theirs = unpickled(ours, monkeypatch, absent)
    if mixer is Mamba2Simple:
        theirs.mixer.__dict__.pop("norm_before_gate")
        theirs = unpickled(theirs, monkeypatch, [])
    torch.testing.assert_close([*theirs(x), theirs.norm(x)], wanted)


def shapes(ends, dim=192, e=384, r=12, n=16, decays=None):
    """The parameters of a published mixer, from its repository: names and shapes."""
    table = {"in_proj.weight": (2 * e, dim), "out_proj.weight": (dim, e)}
    for end in ends:
        table |= {f"conv1d{end}.weight": (e, 1, 4), f"conv1d{end}.bias": (e,), f"x_proj{end}.weight": (r + 2 * n, e)}
        table |= {f"dt_proj{end}.weight": (e, r), f"dt_proj{end}.bias": (e,), f"D{end}": (e,)}
    return table | {f"A{end}_log": (e, n) for end in decays or ends}


@pytest.mark.parametrize(
    ("options", "table"),
    [
        ({}, shapes([""])),  # upstream, UltraLight-VM-UNet, PointMamba
        ({"bimamba_type": "v1"}, shapes([""], decays=["", "_b"])),
        ({"bimamba_type": "v2", "if_devide_out": True}, shapes(["", "_b"])),  # Vim
        ({"bimamba_type": "v2", "init_layer_scale": 1e-4}, shapes(["", "_b"]) | {"gamma": (192,)}),
        ({"bimamba": True}, shapes(["", "_b"])),  # VideoMamba
        ({"bimamba_type": "v3", "nslices": 5}, shapes(["", "_b", "_s"])),  # SegMamba
    ],
    ids=str,
)
def test_state_dicts_of_published_repositories(options, table):
    torch.manual_seed(0)
    theirs = {name: torch.rand(shape) for name, shape in table.items()}
    module = Mamba(d_model=192, layer_idx=0, **options)
    module.load_state_dict(theirs, strict=True)
    ours = module.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_channels_in_two_directions():
    torch.manual_seed(0)
    module = HalvedMamba(16, layer_idx=0, init_layer_scale=0.1)
    assert {key: tuple(t.shape) for key, t in module.state_dict().items() if "_proj.weight" in key} == {
        "in_proj.weight": (128, 16),
        "x_proj.weight": (33, 32),
        "dt_proj.weight": (32, 1),
        "out_proj.weight": (16, 64),
    }
    x, one = torch.randn(2, 9, 16), Mamba(16).double()
    state = {key: t.double() for key, t in module.state_dict().items()}
    ys = []
    for half, rows in enumerate(state["in_proj.weight"].chunk(2)):  # each half by an upstream mixer
        one.load_state_dict(state | {"in_proj.weight": rows, "out_proj.weight": torch.zeros(16, 32).double()})
        one.out_proj = nn.Identity()
        ys.append(one(x.double().flip(1)).flip(1) if half else one(x.double()))
        one.out_proj = nn.Linear(32, 16, bias=False)
    close(module(x), torch.cat(ys, -1) @ state["out_proj.weight"].T)
    with pytest.raises(NotImplementedError, match="'halves' also scans backwards"):
        module(x, InferenceParams(9, 2))


@pytest.mark.parametrize("divide", [True, False])
def test_the_norm_of_a_sum(divide):
    torch.manual_seed(0)
    module = ScanNormMamba(16, bimamba_type="v2", if_devide_out=divide)
    nn.init.normal_(module.norm.weight)
    assert sorted(module.state_dict()) == sorted([*KEYS, *BACK, "norm.weight"])
    x = torch.randn(2, 9, 16)
    plain = Mamba(16, bimamba_type="v2")
    plain.load_state_dict({key: t for key, t in module.state_dict().items() if key != "norm.weight"})
    if divide:
        weight = plain.out_proj.weight.data.clone()
        plain.out_proj.weight.data, y = torch.eye(32), 0
        y = expected(plain, x)
        y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * module.norm.weight
        close(module(x), y @ weight.double().T)
    else:
        close(module(x), expected(plain, x))
    with pytest.raises(ValueError, match="needs bimamba_type='v2', got 'none'"):
        ScanNormMamba(16)


def test_gated_mlp():
    torch.manual_seed(0)
    module = GatedMLP(16, bias=True)
    assert {key: tuple(t.shape) for key, t in module.state_dict().items()} == {
        "fc1.weight": (256, 16),
        "fc1.bias": (256,),
        "fc2.weight": (16, 128),
        "fc2.bias": (16,),
    }
    x = torch.randn(3, 16)
    y, gate = (x.double() @ module.fc1.weight.double().T + module.fc1.bias).chunk(2, -1)
    close(module(x), (y * F.silu(gate)) @ module.fc2.weight.double().T + module.fc2.bias)
    assert GatedMLP(16, 100, 8, multiple_of=32).fc2.weight.shape == (8, 128)


@pytest.mark.parametrize(
    ("args", "mixer", "mlp"),
    [
        ((None,), Mamba, None),
        (({"d_state": 4},), Mamba, None),  # version 1
        ((0, {"layer": "Mamba2", "headdim": 8}), Mamba2, None),
        ((64, {"layer": "Mamba1"}), Mamba, GatedMLP),
    ],
    ids=str,
)
def test_create_block(args, mixer, mlp):
    options = {"norm_epsilon": 1e-3, "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True}
    block = create_block(16, *args, layer_idx=1, **options)
    assert type(block.mixer) is mixer and block.layer_idx == block.mixer.layer_idx == 1
    assert type(block.norm) is RMSNorm and block.norm.eps == 1e-3 and type(block.mlp) is (mlp or type(None))
    y, residual = block(torch.randn(2, 5, 16))
    y, residual = block(y, residual)
    assert y.shape == residual.shape == (2, 5, 16)
    block.apply(lambda module: init_weights(module, n_layer=4))
    bound = 32**-0.5 / 2  # of a linear layer by default, over the root of the layers
    assert block.mixer.out_proj.weight.abs().max().item() == pytest.approx(bound, rel=0.05)
    if mixer is Mamba:
        assert block.mixer.dt_proj.bias.all()


def test_create_block_refuses_what_it_does_not_make():
    with pytest.raises(ValueError, match="must be 'Mamba1' or 'Mamba2', got 'Mamba9'"):
        create_block(16, ssm_cfg={"layer": "Mamba9"})
    with pytest.raises(NotImplementedError, match="MHA for import only"):
        create_block(16, 0, attn_layer_idx=[2], attn_cfg={"num_heads": 2}, layer_idx=2)


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
