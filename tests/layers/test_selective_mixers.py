import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from vim.layers import (
    MambaMixer,
    SelectiveChannelMixer,
    SelectiveSequenceMixer,
    SelectiveTokenMixer,
    cross_merge,
    cross_scan,
)

SELECT = ["conv", "input"]
DIM = 17  # channels with a step size of rank 2


def build(kind, **options):
    """A small mixer in float64, with parameters that all matter."""
    torch.manual_seed(0)
    mixer = kind(**{"d_state": 3, **options}).double()
    with torch.no_grad():
        for name, parameter in mixer.named_parameters():
            if name.rpartition(".")[2] in ("D", "A_log", "dt_bias", "bias", "conv_bias"):
                parameter += 0.3 * torch.randn_like(parameter)
    return mixer


def token_mixer(**options):
    return build(SelectiveTokenMixer, dim=DIM, **options)


def channel_mixer(**options):
    return build(SelectiveChannelMixer, **{"dim": DIM, "width": 10, **options})


def sequence_mixer(**options):
    return build(SelectiveSequenceMixer, **{"dim": DIM, "bidirectional": True, **options})


def image(rows=5, columns=4, dim=DIM, batch=2):
    torch.manual_seed(1)
    return torch.randn(batch, rows, columns, dim, dtype=torch.float64, requires_grad=True)


def recurrence(u, dt, A, B, C, D):
    """One scan, token after token: u, dt (b, l, e), A (e, n), B, C (b, l, n), D (e,)."""
    state, ys = u.new_zeros(*u[:, 0].shape, A.shape[1]), []
    for t in range(u.shape[1]):
        decay = (dt[:, t].unsqueeze(-1) * A).exp()
        state = decay * state + (dt[:, t] * u[:, t]).unsqueeze(-1) * B[:, t].unsqueeze(1)
        ys.append((state * C[:, t].unsqueeze(1)).sum(-1) + D * u[:, t])
    return torch.stack(ys, 1)


def s6_branch(s6, u, selected, route, direction):
    """One branch of an S6, with its part of the parameters."""
    r, n, e = s6.dt_rank, s6.d_state, u.shape[-1]
    dt, B, C = selected.split([r, n, n], -1)
    part = slice(route * e, (route + 1) * e)
    dt = F.softplus(dt @ s6.dt_weight[direction, route] + s6.dt_bias[direction, part])
    return recurrence(u, dt, -s6.A_log[direction, part].exp(), B, C, s6.D[direction, part])


def vmamba_mixer(mixer, x):
    """SelectiveTokenMixer in the plainest terms: four permuted copies, scanned one by one, put back, added up."""
    b, rows, columns, _ = x.shape
    h, z = F.linear(x, mixer.in_proj.weight).chunk(2, -1)
    h = F.conv2d(h.permute(0, 3, 1, 2), mixer.conv2d.weight, mixer.conv2d.bias, padding=1, groups=h.shape[-1])
    h = F.silu(h).permute(0, 2, 3, 1)
    source = h if mixer.select_from == "conv" else x
    weights = mixer.x_proj.weight.unflatten(0, (2, 2, -1))  # (routes, directions, ., .)
    grid, total = torch.arange(rows * columns).view(rows, columns), 0
    for route, order in enumerate((grid.flatten(), grid.t().flatten())):
        for direction, path in enumerate((order, order.flip(0))):
            selected = source.flatten(1, 2)[:, path] @ weights[route, direction].t()
            y = s6_branch(mixer.s6, h.flatten(1, 2)[:, path], selected, route, direction)
            total = total + y[:, path.argsort()]
    y = F.layer_norm(total, total.shape[-1:], mixer.out_norm.weight, mixer.out_norm.bias)
    return (y * F.silu(z.flatten(1, 2))) @ mixer.out_proj.weight.t()


def tied_mixer(mixer, x):
    """SelectiveChannelMixer by the closed form of its matrix: exp(A (S_i - S_j)) C_i B_j dt_j for j before i."""
    b, rows, columns, _ = x.shape
    v, z = (x.flatten(1, 2) @ mixer.in_proj.weight.t()).chunk(2, -1)
    total = 0
    for k in range(2):
        turned = v.flip(-1) if k else v  # the second direction begins at the last channel
        taps = mixer.conv_weight[k].expand(1, 1, -1)
        u = F.conv1d(
            F.pad(turned.flatten(0, 1).unsqueeze(1), (taps.shape[-1] - 1, 0)), taps, mixer.conv_bias[k : k + 1]
        )
        u = F.silu(u).view_as(turned).transpose(1, 2)  # (b, w, l)
        maps = u if mixer.select_from == "conv" else turned.transpose(1, 2)
        pooled = F.adaptive_avg_pool2d(maps.unflatten(-1, (rows, columns)), mixer.pool).flatten(-2)
        dt, B, C = (pooled @ mixer.x_proj[k]).split([1, mixer.d_state, mixer.d_state], -1)
        bias, D = (p[k].flip(0) if k else p[k] for p in (mixer.dt_bias, mixer.D))
        dt = F.softplus(dt.squeeze(-1) + bias)  # (b, w)
        S = dt.cumsum(1)
        decay = ((S.unsqueeze(2) - S.unsqueeze(1)).unsqueeze(-1) * -mixer.A_log[k].exp()).exp()
        M = (decay * C.unsqueeze(2) * B.unsqueeze(1)).sum(-1) * dt.unsqueeze(1)  # (b, w, w)
        y = (M.tril() + torch.diag(D)) @ u
        total = total + (y.flip(1) if k else y).transpose(1, 2)
    y = (total * F.silu(z)) @ mixer.out_proj.weight.t()
    return y.unflatten(1, (rows, columns))


def sequence_reference(mixer, x):
    h, z = F.linear(x, mixer.in_proj.weight).chunk(2, -1)
    total = 0
    for k in range(len(mixer.reverse)):
        turn = (lambda t: t.flip(1)) if k else (lambda t: t)
        taps = mixer.conv_weight[k].unsqueeze(1)
        u = F.pad(turn(h).transpose(1, 2), (taps.shape[-1] - 1, 0))
        u = F.silu(F.conv1d(u, taps, mixer.conv_bias[k], groups=len(taps))).transpose(1, 2)
        selected = (u if mixer.select_from == "conv" else turn(x)) @ mixer.x_proj[k]
        total = total + turn(s6_branch(mixer.s6, u, selected, 0, k))
    return (total * F.silu(z)) @ mixer.out_proj.weight.t()


def check_outputs_and_gradients(mixer, reference, x):
    torch.manual_seed(2)
    y, want = mixer(x), reference(mixer, x).view(x.shape)
    torch.testing.assert_close(y, want)
    probe, inputs = torch.randn_like(y), [x, *mixer.parameters()]
    names = ["x", *dict(mixer.named_parameters())]
    for name, got, wanted in zip(
        names, torch.autograd.grad(y, inputs, probe), torch.autograd.grad(want, inputs, probe), strict=True
    ):
        assert wanted.abs().sum() > 0, name
        torch.testing.assert_close(got, wanted, msg=lambda text, name=name: f"{name}: {text}")


# Against the equations


@pytest.mark.parametrize("select_from", SELECT)
@pytest.mark.parametrize("size", [(5, 4), (1, 6), (3, 1)])
def test_the_token_mixer_scans_rows_columns_and_back(size, select_from):
    check_outputs_and_gradients(token_mixer(select_from=select_from), vmamba_mixer, image(*size))


@torch.no_grad()
@pytest.mark.parametrize(
    "options", [{}, {"gate": False, "conv_bias": False, "d_state": 1, "expand": 1}], ids=["v0", "v2"]
)
@pytest.mark.parametrize("turn", ["half", "transposed"])
def test_a_turned_image_is_mixed_by_exchanged_routes(turn, options):
    mixer, other, x = token_mixer(**options), token_mixer(**options), image()
    axis, turned = {  # of (direction, route), and of the image
        "half": (0, lambda t, *sides: t.flip(sides)),
        "transposed": (1, lambda t, *sides: t.transpose(*sides)),
    }[turn]
    for name in ("dt_weight", "dt_bias", "A_log", "D"):
        stacked = getattr(other.s6, name)
        by_route = stacked if name == "dt_weight" else stacked.unflatten(1, (2, -1))
        stacked.copy_(by_route.flip(axis).reshape(stacked.shape))
    by_route = other.x_proj.weight.unflatten(0, (2, 2, -1))  # (routes, directions, ., .)
    other.x_proj.weight.copy_(by_route.flip(1 - axis).flatten(0, 2))
    other.conv2d.weight.copy_(turned(other.conv2d.weight, 2, 3).clone())
    torch.testing.assert_close(other(turned(x, 1, 2)), turned(mixer(x), 1, 2))


@pytest.mark.parametrize("select_from", SELECT)
@pytest.mark.parametrize(
    ("size", "width", "scanned"), [((5, 4), 10, 10), ((5, 4), 21, 20), ((1, 3), 2, 2), ((1, 3), 3, 3)]
)
def test_the_channel_mixer_is_its_matrix(size, width, scanned, select_from):
    """It scans the columns of its matrix if they are fewer than the tokens, else the tokens."""
    mixer = channel_mixer(width=width, select_from=select_from)
    with Scans() as scans:
        mixer(image(*size))
    assert scans.widths == [scanned]
    check_outputs_and_gradients(mixer, tied_mixer, image(*size))


@pytest.mark.parametrize("select_from", SELECT)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_the_sequence_mixer(bidirectional, select_from):
    mixer = sequence_mixer(bidirectional=bidirectional, select_from=select_from)
    check_outputs_and_gradients(mixer, sequence_reference, image().detach().flatten(1, 2).requires_grad_())


@pytest.mark.parametrize("bidirectional", [False, True])
def test_the_sequence_mixer_is_mamba(bidirectional):
    mixer = sequence_mixer(bidirectional=bidirectional)
    mamba = MambaMixer(DIM, d_state=3, directions="v2" if bidirectional else "none", combine="sum").double()
    weights = {"in_proj.weight": mixer.in_proj.weight, "out_proj.weight": mixer.out_proj.weight}
    for k, b in enumerate(["", "_b"][: len(mixer.reverse)]):
        weights |= {
            f"conv1d{b}.weight": mixer.conv_weight[k].unsqueeze(1),
            f"conv1d{b}.bias": mixer.conv_bias[k],
            f"x_proj{b}.weight": mixer.x_proj[k].t(),
            f"dt_proj{b}.weight": mixer.s6.dt_weight[k, 0].t(),
            f"dt_proj{b}.bias": mixer.s6.dt_bias[k],
            f"A{b}_log": mixer.s6.A_log[k],
            f"D{b}": mixer.s6.D[k],
        }
    mamba.load_state_dict(weights)
    x = image().flatten(1, 2)
    torch.testing.assert_close(mixer(x), mamba(x))


def test_one_direction_reads_no_later_token():
    mixer, x = sequence_mixer(bidirectional=False), image().detach().flatten(1, 2)
    later = x.clone()
    later[:, 12:] += 1
    torch.testing.assert_close(mixer(later)[:, :12], mixer(x)[:, :12])


# What follows from them


def test_swapping_the_routes_turns_rows_into_columns():
    mixer, swapped = token_mixer(), token_mixer()
    state = mixer.state_dict()
    state["conv2d.weight"] = state["conv2d.weight"].transpose(2, 3)
    state["x_proj.weight"] = state["x_proj.weight"].unflatten(0, (2, -1)).flip(0).flatten(0, 1)
    state["s6.dt_weight"] = state["s6.dt_weight"].flip(1)
    for name in ("s6.dt_bias", "s6.A_log", "s6.D"):
        state[name] = state[name].unflatten(1, (2, -1)).flip(1).flatten(1, 2)
    swapped.load_state_dict(state)
    x = image()
    torch.testing.assert_close(swapped(x.transpose(1, 2)), mixer(x).transpose(1, 2))


def test_tied_tokens_may_come_in_any_order_of_one_pool(monkeypatch):
    """With one pooled number all tokens are alike, so that scanning them in other orders would change nothing."""
    monkeypatch.setattr("vim.layers.channel_mixer.POOL", 1)
    mixer, x = channel_mixer(), image()
    shuffled = x.flatten(1, 2)[:, torch.randperm(20)].view_as(x)
    torch.testing.assert_close(mixer(shuffled).flatten(1, 2).sort(1).values, mixer(x).flatten(1, 2).sort(1).values)


def test_cross_scan_and_merge():
    x = torch.arange(6.0).view(1, 2, 3, 1)
    sequences = cross_scan(x, 10 * x)
    assert sequences[0].t().tolist() == [[0, 1, 2, 3, 4, 5], [0, 30, 10, 40, 20, 50]]
    torch.testing.assert_close(cross_merge(sequences, 2, 3), 11 * x)


# Cost


class Scans(TorchDispatchMode):
    """The channels of each scan that is run."""

    def __enter__(self):
        self.widths = []
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.vim.selective_scan_forward.default:
            self.widths.append(args[0].shape[-1])
        return function(*args, **(kwargs or {}))


def test_all_routes_are_one_scan():
    with Scans() as scans:
        token_mixer()(image())
    assert scans.widths == [4 * DIM]  # two routes of 2 DIM channels, each in both directions


def kept(mixer, x):
    """Bytes that the backward pass keeps, of activations."""
    sizes, ours = {}, {p.untyped_storage().data_ptr() for p in mixer.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ours:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor  # so that it lives, and its address is its own

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = mixer(x)
    del y
    return sum(sizes.values())


@pytest.mark.parametrize("make", [token_mixer, channel_mixer])
def test_memory_is_linear_in_tokens(make):
    mixer = make().float()
    small, large = (kept(mixer, torch.randn(1, side, side, DIM)) for side in (32, 64))
    assert large < 4.1 * small


def test_one_copy_in_the_order_of_columns_is_all_that_is_kept_of_routes():
    e, n, side = 32, 1, 64
    mixer = SelectiveTokenMixer(16, d_state=n)
    once = 16 + 2 * e + e + 4 * e  # x, the outputs of in_proj and the convolution, the norm and the gates
    scan = 2 * e + 4 * e + 4 * (1 + 2 * n) + 4 * e * n / 16  # u by rows and columns, steps, B and C, a state in 16
    statistics = 2
    assert kept(mixer, torch.randn(1, side, side, 16)) / 4 / side**2 < once + scan + statistics + 1


# The rest


@pytest.mark.parametrize("make", [token_mixer, channel_mixer, sequence_mixer])
def test_low_precision_stays_near(make):
    x = image().detach()
    x = x.flatten(1, 2) if make is sequence_mixer else x
    want = make()(x).float()
    x, bound = x.float(), 0.03 * want.abs().max().item()
    torch.testing.assert_close(make().float()(x), want, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(make().float()(x).float(), want, rtol=0, atol=bound)
    for dtype in (torch.bfloat16, torch.float16):
        low = make().to(dtype)(x.to(dtype))
        assert low.dtype == dtype
        torch.testing.assert_close(low.float(), want, rtol=0, atol=bound)


def test_initialisation():
    token, channel = SelectiveTokenMixer(64, depth=9), SelectiveChannelMixer(64, 128, depth=9)
    for A_log in (token.s6.A_log, channel.A_log):
        torch.testing.assert_close(A_log.exp(), torch.arange(1.0, 17).expand_as(A_log))
    for steps in (F.softplus(token.s6.dt_bias), F.softplus(channel.dt_bias)):
        assert 1e-3 * 0.99 < steps.min() < 2e-3 and 5e-2 < steps.max() < 0.1 * 1.01
    assert (token.s6.D == 1).all() and (channel.D == 1).all()
    assert 0.9 * 4**-0.5 < token.s6.dt_weight.abs().max() <= 4**-0.5  # rank 4
    assert 0.9 * 128**-0.5 / 3 < token.out_proj.weight.abs().max() <= 128**-0.5 / 3


@pytest.mark.parametrize("make", [token_mixer, channel_mixer, sequence_mixer])
def test_a_wrong_source_is_refused(make):
    with pytest.raises(ValueError, match=r"select_from must be one of \('conv', 'input'\), got 'z'"):
        make(select_from="z")
