import itertools

import pytest
import torch

from tests.golden.check import TOLERANCE as GOLDEN
from tests.golden.check import load_cases, relative
from tests.golden.weights import generate
from tests.kernels.test_scan import TOLERANCE, alternating, assert_close, assert_fake_strides, in_float64
from tests.kernels.test_scan import run_with_gradients as run
from vim import export
from vim.kernels import available_backends, selective_scan, ssd
from vim.kernels.ssd.reference import Inputs, Options
from vim.kernels.traceable import DECOMPOSITIONS, onnx_loop

SHAPES = [  # b, k, l, h, p, g, n, chunk_size
    (1, 1, 1, 1, 1, 1, 1, None),
    (2, 2, 7, 6, 4, 1, 4, 3),
    (1, 2, 99, 6, 8, 2, 16, None),
    (2, 1, 33, 3, 5, 3, 7, 16),
    (1, 3, 66, 2, 19, 1, 24, None),
    (2, 2, 16, 4, 3, 2, 1, 64),
    (1, 1, 70, 2, 64, 1, 64, None),
    (1, 1, 40, 12, 1, 1, 8, 1),
    (2, 1, 1, 4, 32, 2, 16, None),
]
OPTIONAL = ("D", "z", "dt_bias", "initial_state")
SOFTPLUS = {"dt_softplus": True}


def make_inputs(b, k, l, h, p, g, n, combine="none", dtype=torch.float64, options=OPTIONAL):
    """Inputs rounded to dtype; A, D, dt_bias and the state at least float32."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    state = torch.promote_types(dtype, torch.float32)
    gate = normal(b, k, l, h, p)
    inputs = {
        "x": normal(b, k, l, h, p).to(dtype),
        "dt": (0.5 * normal(b, k, l, h)).to(dtype),
        "A": (-4 * torch.rand(k, h, generator=draw, dtype=torch.float64)).to(state),
        "B": normal(b, k, l, g, n).to(dtype),
        "C": normal(b, k, l, g, n).to(dtype),
        "D": normal(k, h, p).to(state),
        "z": (gate if combine == "none" else gate[:, 0]).to(dtype),
        "dt_bias": (normal(k, h) - 1).to(state),
        "initial_state": normal(b, k, h, p, n).to(state),
    }
    return {name: value for name, value in inputs.items() if name not in OPTIONAL or name in options}


def one_direction(inputs):
    return {name: t.squeeze(0 if name in ("A", "D", "dt_bias") else 1) for name, t in inputs.items()}


def assert_matches_reference(inputs, dtype, backend, chunk_size=None, **options):
    got = run(inputs, scan=ssd, **options, backend=backend, chunk_size=chunk_size)
    assert got["y"].dtype == dtype
    assert_close(got, run(in_float64(inputs), scan=ssd, **options, backend="reference"), dtype)


@pytest.fixture(params=load_cases("ssd.json").values(), ids=lambda case: case["name"])
def golden(request):
    """A case of the published op, its inputs, and the noise that y and the state are multiplied with."""
    case = request.param
    b, l, h, p, g, n = case["sizes"].values()
    sizes = [(b, l, h, p), (b, l, h), (b, l, g, n), (b, l, g, n), (h,), (h, p) if case["D"] == "h,p" else (h,), (h,)]
    sizes += [(b, h, p, n), (b, l, h, p), (b, l, h, p), (b, h, p, n)]
    x, dt, B, C, A, D, bias, state, z, *noise = (generate(case["seed"] * 100 + i, s) for i, s in enumerate(sizes))
    inputs = {"x": x, "dt": dt, "A": -torch.exp(0.5 * A), "B": B, "C": C, "D": 1 + 0.1 * D, "dt_bias": -2 + 0.5 * bias}
    inputs |= {name: t for name, t in (("initial_state", state), ("z", z)) if name in case["given"]}
    return case, {name: t.requires_grad_() for name, t in inputs.items()}, noise


def test_published_results(golden, backend):
    case, inputs, noise = golden
    options = {"dt_softplus": True, "return_last_state": True, "backend": backend}
    options |= {"dt_limit": case["dt_limit"]} if case["dt_limit"] else {}
    for size in [None] if backend == "reference" else [None, *case["chunk_sizes"]]:
        y, state = ssd(**inputs, **options, chunk_size=size)
        grads = torch.autograd.grad((y * noise[0]).sum() + (state * noise[1]).sum(), inputs.values())
        assert relative(y, case["y"]) < GOLDEN
        assert relative(y[-1, -1] if y[-1, -1].numel() > 16 else y.flatten()[-16:], case["y_end"]) < GOLDEN
        assert relative(state, case["last_state"]) < GOLDEN
        for name, grad in zip(inputs, grads, strict=True):
            want = case["gradients"][name]
            assert relative(grad, want["first"]) < GOLDEN, name
            assert grad.double().norm().item() == pytest.approx(want["norm"], rel=GOLDEN), name


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, dtype, backend):
    if backend == "cpu" and dtype == torch.float64:
        pytest.skip("the native backend computes in float32")
    *sizes, chunk_size = shape
    inputs = make_inputs(*sizes, dtype=dtype)
    assert_matches_reference(inputs, dtype, backend, chunk_size, **SOFTPLUS, reverse=alternating(shape[1]))


@pytest.mark.parametrize("present", [c for r in range(5) for c in itertools.combinations(OPTIONAL, r)], ids="-".join)
@pytest.mark.parametrize("combine", ["none", "sum", "mean"])
def test_optional_inputs(present, combine, backend):
    inputs = make_inputs(2, 2, 19, 4, 5, 2, 6, combine=combine, dtype=torch.float32, options=present)
    inputs["dt"] = inputs["dt"].abs()
    options = {"dt_softplus": "dt_bias" in present, "reverse": [False, True], "combine": combine}
    assert_matches_reference(inputs, torch.float32, backend, 8, **options)


@pytest.mark.parametrize("combine", ["none", "sum", "mean"])
@pytest.mark.parametrize("shape", [(2, 2, 23, 4, 10, 2, 16), (1, 3, 9, 3, 11, 1, 5), (1, 2, 70, 2, 7, 1, 1)], ids=str)
def test_every_instruction_set(shape, combine, instruction_set):
    inputs = make_inputs(*shape, combine=combine, dtype=torch.float32)
    options = {"reverse": alternating(shape[1]), "combine": combine}
    assert_matches_reference(inputs, torch.float32, "cpu", **SOFTPLUS, **options)


@pytest.mark.parametrize("softplus", [True, False])
def test_a_step_outside_its_limits_has_no_gradient(softplus, backend):
    inputs = make_inputs(1, 2, 21, 2, 3, 1, 4, dtype=torch.float32)
    options = {"dt_softplus": softplus, "dt_limit": (0.1, 0.4), "reverse": [False, True]}
    assert_matches_reference(inputs, torch.float32, backend, **options)
    raw = inputs["dt"] + inputs["dt_bias"][:, None]
    steps = torch.nn.functional.softplus(raw) if softplus else raw
    outside = (steps < 0.1) | (steps > 0.4)
    grad = run(inputs, scan=ssd, **options, backend=backend)["grad_dt"]
    assert outside.any() and not outside.all()
    assert (grad[outside] == 0).all() and (grad[~outside] != 0).all()


def test_a_step_at_a_limit_has_its_gradient(backend):
    inputs = make_inputs(1, 2, 9, 2, 3, 1, 4, dtype=torch.float32, options=())
    inputs["dt"] = (inputs["dt"] > 0) * 0.25 + 0.25
    options = {"reverse": [False, True], "backend": backend}
    got, want = (run(inputs, scan=ssd, **options, dt_limit=limit) for limit in ((0.25, 0.5), (0.0, 1.0)))
    torch.testing.assert_close(got["grad_dt"], want["grad_dt"])


def test_gradients_of_tiny_steps(backend):
    inputs = make_inputs(1, 2, 9, 2, 3, 1, 4, dtype=torch.float32, options=())
    inputs["dt"] -= 16
    options = {**SOFTPLUS, "reverse": [False, True]}
    got = run(inputs, scan=ssd, **options, backend=backend)["grad_dt"]
    want = run(in_float64(inputs), scan=ssd, **options, backend="reference")["grad_dt"]
    assert relative(got, want.tolist()) < GOLDEN


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_gradients_numerically(backend):
    inputs = make_inputs(1, 2, 3, 2, 2, 2, 2, combine="mean")
    names = list(inputs)

    def of_tensors(*tensors):
        given = dict(zip(names, tensors, strict=True))
        options = {**SOFTPLUS, "dt_limit": (0.01, 5.0), "combine": "mean", "chunk_size": 2}
        return ssd(**given, **options, reverse=[False, True], return_last_state=True, backend=backend)

    assert torch.autograd.gradcheck(of_tensors, [value.requires_grad_() for value in inputs.values()])


def test_reverse_is_the_flipped_scan_of_flipped_tokens(backend):
    inputs = one_direction(make_inputs(2, 1, 75, 4, 6, 2, 8, dtype=torch.float32))
    tokens = ("x", "dt", "B", "C", "z")
    flipped = {name: value.flip(1) if name in tokens else value for name, value in inputs.items()}
    got = run(inputs, scan=ssd, **SOFTPLUS, reverse=True, backend=backend, chunk_size=16)
    want = run(flipped, scan=ssd, **SOFTPLUS, backend=backend, chunk_size=16)
    torch.testing.assert_close(got["y"], want["y"].flip(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got["last_state"], want["last_state"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("split", [1, 32, 49])
@pytest.mark.parametrize("backwards", [False, True])
def test_a_scan_in_two_parts_is_the_scan(backwards, split, backend):
    inputs = make_inputs(2, 1, 50, 4, 6, 2, 8, dtype=torch.float32)
    options = {**SOFTPLUS, "reverse": [backwards], "return_last_state": True, "backend": backend, "chunk_size": 16}
    whole, state = ssd(**inputs, **options)
    carried, parts = inputs.pop("initial_state"), {}
    for span in (slice(0, split), slice(split, 50))[:: -1 if backwards else 1]:
        part = {name: v[:, :, span] if name in ("x", "dt", "B", "C", "z") else v for name, v in inputs.items()}
        parts[span.start], carried = ssd(**part, **options, initial_state=carried)
    torch.testing.assert_close(torch.cat([parts[0], parts[split]], 2), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(carried, state, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk_size", [1, 7, 32, 77, 200])
def test_results_do_not_depend_on_the_chunks(chunk_size, backend):
    inputs = make_inputs(2, 2, 77, 4, 6, 2, 8, combine="sum", dtype=torch.float32)
    options = {**SOFTPLUS, "reverse": [True, False], "combine": "sum", "backend": backend}
    got, want = (run(inputs, scan=ssd, **options, chunk_size=size) for size in (chunk_size, None))
    assert_close(got, in_float64(want), torch.float32)


def test_heads_of_one_channel_are_a_selective_scan(backend):
    inputs = make_inputs(2, 2, 60, 6, 1, 2, 8, dtype=torch.float32)
    got = ssd(**inputs, **SOFTPLUS, reverse=[False, True], return_last_state=True, backend=backend)
    A = inputs["A"].unsqueeze(2).expand(2, 6, 8)
    u, D, z, state = (
        inputs[name].squeeze(-1 if name != "initial_state" else 3) for name in ("x", "D", "z", "initial_state")
    )
    options = {"delta_softplus": True, "reverse": [False, True], "initial_state": state, "return_last_state": True}
    rest = {"D": D, "z": z, "delta_bias": inputs["dt_bias"]}
    y, last = selective_scan(u, inputs["dt"], A.contiguous(), inputs["B"], inputs["C"], **rest, **options)
    torch.testing.assert_close(got[0].squeeze(-1), y, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got[1].squeeze(3), last, rtol=1e-4, atol=1e-4)


def test_shared_tensors_may_be_expanded(backend):
    inputs = make_inputs(2, 1, 9, 4, 5, 2, 4, dtype=torch.float32, options=("D",))
    tokens = {name: v.expand(2, 2, *v.shape[2:]) for name, v in inputs.items() if name not in ("A", "D")}
    rest = {name: inputs[name].expand(2, *inputs[name].shape[1:]) for name in ("A", "D")}
    y = ssd(**tokens, **rest, reverse=[False, True], **SOFTPLUS, backend=backend)
    for k, reverse in enumerate([False, True]):
        alone = ssd(**inputs, reverse=[reverse], **SOFTPLUS, backend=backend)
        torch.testing.assert_close(y[:, k], alone[:, 0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("combine", ["none", "sum"])
def test_slices_of_one_projection(combine, backend):
    """As a mixer gives them: x, B and C of one tensor, dt of another, none contiguous."""
    inputs = make_inputs(2, 2, 37, 4, 6, 2, 8, combine=combine, dtype=torch.float32)
    options = {**SOFTPLUS, "reverse": [False, True], "combine": combine}
    want = run(in_float64(inputs), scan=ssd, **options, backend="reference")
    wide = torch.cat([inputs[name].flatten(3) for name in ("x", "B", "C", "dt")], 3)
    cut = wide.split([24, 16, 16, 4], 3)
    views = {name: t.unflatten(3, inputs[name].shape[3:]) for name, t in zip(("x", "B", "C", "dt"), cut, strict=True)}
    side_by_side = {name: inputs[name].transpose(-1, -2).contiguous().transpose(-1, -2) for name in ("z", "D")}
    leaves = {**inputs, **views, **side_by_side}
    y, state = ssd(**leaves, **options, return_last_state=True, backend=backend)
    assert_close({"y": y, "last_state": state}, {name: want[name] for name in ("y", "last_state")}, torch.float32)


def test_skip_connections_of_heads_or_channels(backend):
    inputs = one_direction(make_inputs(2, 1, 9, 4, 5, 2, 4, dtype=torch.float32, options=("D",)))
    heads = inputs["D"][:, 0].clone().requires_grad_()
    y = ssd(**{**inputs, "D": heads}, **SOFTPLUS, backend=backend)
    want = ssd(**{**inputs, "D": heads.unsqueeze(1).expand(4, 5)}, **SOFTPLUS, backend=backend)
    torch.testing.assert_close(y, want)
    (grad,) = torch.autograd.grad(y.sum(), heads)
    torch.testing.assert_close(grad, inputs["x"].sum((0, 1, 3)))


@pytest.mark.skipif("cpu" not in available_backends(), reason="the native backend is not built")
def test_native_results_do_not_depend_on_threads():
    inputs = make_inputs(2, 2, 80, 4, 20, 2, 16, dtype=torch.float32)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(run(inputs, scan=ssd, **SOFTPLUS, reverse=[False, True], backend="cpu"))
    finally:
        torch.set_num_threads(threads)
    for name, value in results[0].items():
        assert all(torch.equal(value, other[name]) for other in results[1:]), name


def test_large_steps_neither_overflow_nor_hide_nan(backend):
    inputs = make_inputs(1, 1, 80, 2, 4, 1, 4, dtype=torch.float32, options=("z",))
    inputs["dt"] = inputs["dt"] * 1000
    inputs["z"] = inputs["z"] * 200
    for name, value in run(inputs, scan=ssd, **SOFTPLUS, reverse=[False], backend=backend).items():
        assert value.isfinite().all(), name
    inputs["dt"][0, 0, 5, 1] = float("nan")
    y = ssd(**inputs, **SOFTPLUS, reverse=[False], backend=backend)
    assert y[0, 0, 5:, 1].isnan().all()
    assert y[0, 0, :, 0].isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3)}, r"x must be \(b, l, h, p\) or \(b, k, l, h, p\), got \(3,\)"),
        ({"x": torch.zeros(2, 0, 4, 3)}, "x must not be empty"),
        ({"dt": torch.zeros(2, 5, 4)}, r"dt must be \(b, k, l, h\) = \(2, 1, 6, 4\), got \(2, 1, 5, 4\)"),
        ({"A": torch.zeros(5)}, r"A must be \(k, h\) = \(1, 4\), got \(1, 5\)"),
        ({"B": torch.zeros(2, 5, 2)}, "B must be"),
        ({"B": torch.zeros(2, 6, 3, 3), "C": torch.zeros(2, 6, 3, 3)}, "divides h = 4, got 3"),
        ({"C": torch.zeros(2, 6, 2, dtype=torch.bfloat16)}, "C must be float32, got bfloat16"),
        ({"A": torch.zeros(4, dtype=torch.float16)}, "A must be float32, got float16"),
        ({"D": torch.zeros(4, 2)}, r"D must be \(k, h, p\) = \(1, 4, 3\), got \(1, 4, 2\)"),
        ({"D": torch.zeros(4, 3, device="meta")}, "D must be on cpu, got meta"),
        ({"z": torch.zeros(2, 6, 4, 5)}, "z must be"),
        ({"initial_state": torch.zeros(2, 4, 3, 5)}, r"initial_state must be .* = \(2, 1, 4, 3, 2\)"),
        ({"reverse": [True, False]}, "a bool for each of the 1 directions"),
        ({"combine": "product"}, "combine must be 'none', 'sum' or 'mean', got 'product'"),
        ({"chunk_size": -1}, "chunk_size must be a positive number of tokens, got -1"),
        ({"dt_limit": (1.0, 0.1)}, r"dt_limit must be \(least, greatest\), got \(1.0, 0.1\)"),
        ({"backend": "cuda"}, "backend must be 'auto' or one of"),
    ],
)
def test_wrong_input_is_told(change, message):
    inputs = {
        "x": torch.zeros(2, 6, 4, 3),
        "dt": torch.zeros(2, 6, 4),
        "A": torch.zeros(4),
        "B": torch.zeros(2, 6, 2),
        "C": torch.zeros(2, 6, 2),
    }
    ssd(**inputs, reverse=[True])
    with pytest.raises(ValueError, match=message) as raised:
        ssd(**{**inputs, **change})
    assert "\n" not in str(raised.value)


def canonical(combine, requires_grad=True, **sizes):
    """The tensors of the op itself."""
    sizes = {"b": 2, "k": 2, "l": 5, "h": 4, "p": 5, "g": 2, "n": 4, **sizes}
    inputs = make_inputs(**sizes, combine=combine, dtype=torch.float32)
    if combine != "none":
        inputs["z"] = inputs["z"].unsqueeze(1)
    return Inputs(**{name: v.requires_grad_(requires_grad) for name, v in inputs.items()})


@pytest.mark.parametrize("combine", ["none", "sum"])
def test_opcheck(combine, backend):
    inputs = canonical(combine)
    options = {"reverse": [False, True], "dt_softplus": True, "combine": combine, "backend": backend}
    options["return_last_state"] = True
    torch.library.opcheck(torch.ops.vim.ssd, inputs, options)
    plain = tuple(t.detach() for t in inputs)
    torch.library.opcheck(torch.ops.vim.ssd_forward, plain, {**options, "save": True})
    y, state, *kept = torch.ops.vim.ssd_forward(*plain, **options, save=True)
    grads = (torch.randn_like(y), torch.randn_like(state), *kept)
    assert_fake_strides(torch.ops.vim.ssd_backward, (*grads, *plain), options)


@pytest.mark.parametrize("name", ["ssd", "ssd_forward", "ssd_backward"])
def test_arguments_are_those_of_the_schema(name):
    """PyTorch leaves out what is at its default."""
    arguments = getattr(torch.ops.vim, name).default._schema.arguments
    defaults = {a.name: a.default_value for a in arguments if a.has_default_value() and a.name != "save"}
    assert defaults == {**Inputs._field_defaults, **Options._field_defaults}
    own = [a.name for a in arguments if a.name not in ("grad_y", "grad_state", "ungated", "saved", "save")]
    assert own == [*Inputs._fields, *Options._fields]
    assert [a.name for a in arguments if a.kwarg_only and a.name != "save"] == list(Options._fields)


def test_autocast_keeps_the_state_in_float32():
    inputs = make_inputs(1, 1, 12, 4, 4, 1, 4, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = ssd(**inputs, **SOFTPLUS, reverse=[False], return_last_state=True)
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    rounded = {n: v.bfloat16() if n in ("x", "dt", "B", "C", "z") else v for n, v in inputs.items()}
    torch.testing.assert_close(y, ssd(**rounded, **SOFTPLUS, reverse=[False]))


def test_inference_mode(backend):
    inputs = make_inputs(2, 2, 9, 4, 5, 1, 4, dtype=torch.float32)
    options = {**SOFTPLUS, "reverse": [False, True], "return_last_state": True, "backend": backend}
    with torch.inference_mode():
        results = ssd(**inputs, **options)
    for got, want in zip(results, ssd(**inputs, **options), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_gradients_where_no_state_is_returned(backend):
    """The op's empty last state has a gradient too, an empty one."""
    inputs = [t.requires_grad_() for t in mixer_inputs()]
    y, state = torch.ops.vim.ssd(*inputs, reverse=[False, True], backend=backend)
    assert state.numel() == 0
    got = torch.autograd.grad(y.sum() + state.sum(), inputs, retain_graph=True)
    for grad, want in zip(got, torch.autograd.grad(y.sum(), inputs), strict=True):
        torch.testing.assert_close(grad, want, rtol=0, atol=0)


def test_meta():
    inputs = make_inputs(2, 2, 7, 4, 6, 1, 4, dtype=torch.float32)
    inputs = {name: value.to("meta") for name, value in inputs.items()}
    y, state = ssd(**inputs, reverse=[False, True], return_last_state=True)
    assert (y.shape, state.shape, y.device.type) == ((2, 2, 7, 4, 6), (2, 2, 4, 6, 4), "meta")


class Mixer(torch.nn.Module):
    def forward(self, x, dt, A, B, C):
        y, _ = torch.ops.vim.ssd(
            x, dt, A, B, C, reverse=[0, 1], dt_softplus=True, dt_min=0.01, dt_max=float("inf"), combine="mean"
        )
        return y


def mixer_inputs(**sizes):
    return [t.detach() for t in canonical("mean", **sizes)[:5]]


def test_compile_sees_one_op():
    torch._dynamo.reset()
    compiled = torch.compile(Mixer(), fullgraph=True, backend="aot_eager", dynamic=True)
    for b, l in ((2, 9), (3, 14)):
        inputs = [t.requires_grad_() for t in mixer_inputs(b=b, l=l)]
        y, want = compiled(*inputs), Mixer()(*inputs)
        torch.testing.assert_close(y, want)
        pull = torch.randn_like(y)
        for got, grad in zip(
            torch.autograd.grad(y, inputs, pull), torch.autograd.grad(want, inputs, pull), strict=True
        ):
            torch.testing.assert_close(got, grad)


def test_export_with_dynamic_batch_and_length():
    b, l = torch.export.Dim("b", min=1, max=64), torch.export.Dim("l", min=1, max=4096)
    tokens = {0: b, 2: l}
    program = torch.export.export(
        Mixer(), tuple(mixer_inputs()), dynamic_shapes=(tokens, tokens, None, tokens, tokens), strict=False
    )
    assert [node.target for node in program.graph.nodes if "ssd" in str(node.target)] == [torch.ops.vim.ssd.default]
    inputs = mixer_inputs(b=3, l=30)
    torch.testing.assert_close(program.module()(*inputs), Mixer()(*inputs))


def test_torchscript(tmp_path):
    inputs = mixer_inputs()
    torch.jit.script(Mixer()).save(tmp_path / "mixer.pt")
    torch.testing.assert_close(torch.jit.load(tmp_path / "mixer.pt")(*inputs), Mixer()(*inputs))
    torch.testing.assert_close(torch.jit.trace(Mixer(), inputs)(*inputs), Mixer()(*inputs))


class Block(torch.nn.Module):
    """Tokens (b, l, 35) to (b, l, 3, 4), through the op with all its inputs and two directions."""

    def __init__(self):
        super().__init__()
        rest = make_inputs(1, 2, 1, 3, 4, 1, 4, dtype=torch.float32)
        self.rest = {name: rest[name] for name in ("A", "D", "dt_bias", "initial_state")}

    def forward(self, tokens):
        x, dt, B, C, z = tokens.unsqueeze(1).expand(-1, 2, -1, -1).split([12, 3, 4, 4, 12], -1)
        x, z = (t.unflatten(-1, (3, 4)) for t in (x, z))
        rest = {**self.rest, "initial_state": self.rest["initial_state"].expand(tokens.shape[0], -1, -1, -1, -1)}
        options = {"reverse": [False, True], "dt_softplus": True, "dt_limit": (0.1, 1.0), "combine": "mean"}
        return ssd(x, dt, B=B, C=C, z=z[:, 0], **rest, **options)


def test_onnx(tmp_path):
    """Products of matrices for any batch, with a ragged last chunk."""
    block = Block()
    tokens = torch.randn(2, 150, 35)
    program = torch.export.export(block, (tokens,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    export._save_onnx(program, tmp_path / "block.onnx", DECOMPOSITIONS, onnx_loop)
    run_file = export.load_onnx(tmp_path / "block.onnx")
    for b in (1, 2, 5):
        tokens = torch.randn(b, 150, 35)
        torch.testing.assert_close(run_file(tokens), block(tokens), rtol=1e-5, atol=1e-5)
