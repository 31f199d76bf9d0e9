import itertools

import pytest
import torch

from vim.kernels import available_backends, selective_scan
from vim.kernels.scan import chunked
from vim.kernels.scan.reference import Inputs, Options

# rtol and atol, relative to the largest element of the reference in float64
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
SHAPES = [  # b, k, l, d, g, n
    (1, 1, 1, 1, 1, 1),
    (2, 2, 7, 24, 1, 4),
    (1, 2, 197, 48, 2, 16),
    (2, 1, 33, 40, 1, 5),
    (1, 3, 300, 19, 1, 24),
    (2, 2, 16, 48, 3, 16),
    (1, 1, 17, 130, 1, 64),
    (1, 2, 21, 40, 2, 1),
    (2, 1, 19, 24, 1, 8),
]
OPTIONAL = ("D", "z", "delta_bias", "initial_state")


def make_inputs(b, k, l, d, g, n, combine="none", dtype=torch.float64, options=OPTIONAL):
    """Inputs rounded to dtype; A, D, delta_bias and the state at least float32."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    state = torch.promote_types(dtype, torch.float32)
    gate = normal(b, k, l, d)
    inputs = {
        "u": normal(b, k, l, d).to(dtype),
        "delta": (0.5 * normal(b, k, l, d)).to(dtype),
        "A": (-4 * torch.rand(k, d, n, generator=draw, dtype=torch.float64)).to(state),
        "B": normal(b, k, l, g, n).to(dtype),
        "C": normal(b, k, l, g, n).to(dtype),
        "D": normal(k, d).to(state),
        "z": (gate if combine == "none" else gate[:, 0]).to(dtype),
        "delta_bias": (normal(k, d) - 1).to(state),
        "initial_state": normal(b, k, d, n).to(state),
    }
    return {name: value for name, value in inputs.items() if name not in OPTIONAL or name in options}


def run_with_gradients(inputs, seed=1, scan=selective_scan, **options):
    leaves = {name: value.clone().requires_grad_() for name, value in inputs.items()}
    y, state = scan(**leaves, **options, return_last_state=True)
    draw = torch.Generator().manual_seed(seed)
    pull = [torch.randn(t.shape, generator=draw, dtype=torch.float64).to(t.dtype) for t in (y, state)]
    grads = torch.autograd.grad([y, state], list(leaves.values()), pull)
    return {"y": y, "last_state": state, **{f"grad_{name}": grad for name, grad in zip(leaves, grads, strict=True)}}


def in_float64(inputs):
    return {name: value.double() for name, value in inputs.items()}


def assert_close(got, want, dtype):
    tolerance = TOLERANCE[dtype]
    for name, reference in want.items():
        scale = reference.abs().max().clamp_min(1e-2).item()
        torch.testing.assert_close(
            got[name].double(), reference, rtol=0, atol=tolerance * scale, msg=lambda m, name=name: f"{name}: {m}"
        )


def alternating(k):
    return [i % 2 == 1 for i in range(k)]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, dtype, backend):
    if backend == "cpu" and dtype == torch.float64:
        pytest.skip("the native backend computes in float32")
    inputs = make_inputs(*shape, dtype=dtype)
    options = {"delta_softplus": True, "reverse": alternating(shape[1])}
    got = run_with_gradients(inputs, **options, backend=backend)
    assert got["y"].dtype == dtype
    assert_close(got, run_with_gradients(in_float64(inputs), **options, backend="reference"), dtype)


@pytest.mark.parametrize("combine", ["none", "sum", "mean"])
@pytest.mark.parametrize("shape", [(2, 2, 23, 40, 2, 16), (1, 3, 9, 33, 1, 5), (1, 2, 19, 42, 2, 1)], ids=str)
def test_every_instruction_set(shape, combine, instruction_set):
    inputs = make_inputs(*shape, combine=combine, dtype=torch.float32)
    options = {"delta_softplus": True, "reverse": alternating(shape[1]), "combine": combine}
    got = run_with_gradients(inputs, **options, backend="cpu")
    assert_close(got, run_with_gradients(in_float64(inputs), **options, backend="reference"), torch.float32)


@pytest.mark.parametrize("n", [5, 16])
def test_steep_steps_beside_growing_states(n, instruction_set):
    inputs = make_inputs(1, 2, 27, 40, 1, n, dtype=torch.float32)
    inputs["A"][:, :8] *= -0.1
    inputs["delta"][:, :, 5, 16:24] = 300
    options = {"delta_softplus": True, "reverse": [False, True]}
    got = run_with_gradients(inputs, **options, backend="cpu")
    assert_close(got, run_with_gradients(in_float64(inputs), **options, backend="reference"), torch.float32)


@pytest.mark.parametrize("n", [5, 16])
def test_a_steep_step_before_nan(n, instruction_set):
    inputs = make_inputs(1, 1, 8, 16, 1, n, dtype=torch.float32, options=())
    inputs["delta"][0, 0, 2], inputs["delta"][0, 0, 5] = 300, float("nan")
    got = selective_scan(**inputs, reverse=[False], backend="cpu")[:, :, :5]
    want = selective_scan(**in_float64(inputs), reverse=[False], backend="reference")[:, :, :5]
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5 * want.abs().max().item())


@pytest.mark.parametrize("combine", ["none", "mean"])
def test_chunked_gradients_of_many_images(combine, monkeypatch):
    monkeypatch.setattr(chunked, "CACHED", 1)  # each image on its own
    inputs = make_inputs(3, 2, 20, 24, 2, 4, combine)
    options = {"delta_softplus": True, "reverse": [False, True], "combine": combine}
    want = run_with_gradients(inputs, **options, backend="reference")
    assert_close(run_with_gradients(inputs, **options, backend="chunked"), want, torch.float64)


@pytest.mark.parametrize("present", [c for r in range(5) for c in itertools.combinations(OPTIONAL, r)], ids="-".join)
@pytest.mark.parametrize("combine", ["none", "mean"])
def test_optional_inputs(present, combine, backend):
    inputs = make_inputs(2, 2, 19, 20, 1, 6, combine=combine, dtype=torch.float32, options=present)
    inputs["delta"] = inputs["delta"].abs()
    options = {"delta_softplus": "delta_bias" in present, "reverse": [False, True], "combine": combine}
    got = run_with_gradients(inputs, **options, backend=backend)
    assert_close(got, run_with_gradients(in_float64(inputs), **options, backend="reference"), torch.float32)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_gradients_numerically(backend):
    inputs = make_inputs(1, 2, 5, 4, 2, 3)
    names = list(inputs)

    def run(*tensors):
        given = dict(zip(names, tensors, strict=True))
        return selective_scan(
            **given, delta_softplus=True, reverse=[False, True], return_last_state=True, backend=backend
        )

    assert torch.autograd.gradcheck(run, [value.requires_grad_() for value in inputs.values()])


def test_reverse_is_the_flipped_scan_of_flipped_tokens(backend):
    inputs = make_inputs(2, 1, 37, 24, 1, 8, dtype=torch.float32, options=("D", "z", "delta_bias"))
    inputs = {name: value.squeeze(0 if name in ("A", "D", "delta_bias") else 1) for name, value in inputs.items()}
    flipped = {name: value.flip(1) if value.dim() >= 3 else value for name, value in inputs.items()}
    y = selective_scan(**inputs, delta_softplus=True, reverse=True, backend=backend)
    turned = selective_scan(**flipped, delta_softplus=True, backend=backend)
    torch.testing.assert_close(y, turned.flip(1), rtol=1e-5, atol=1e-5)


def test_a_scan_in_two_parts_is_the_scan(backend):
    inputs = make_inputs(2, 1, 50, 24, 1, 8, dtype=torch.float32, options=("D", "delta_bias"))
    whole, state = selective_scan(
        **inputs, delta_softplus=True, reverse=[False], return_last_state=True, backend=backend
    )
    parts, carried = [], None
    for span in (slice(0, 21), slice(21, 50)):
        part = {name: v[:, :, span] if name in ("u", "delta", "B", "C") else v for name, v in inputs.items()}
        y, carried = selective_scan(
            **part,
            delta_softplus=True,
            reverse=[False],
            initial_state=carried,
            return_last_state=True,
            backend=backend,
        )
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 2), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(carried, state, rtol=1e-5, atol=1e-5)


def test_linear_in_u(backend):
    inputs = make_inputs(1, 1, 40, 16, 1, 4, dtype=torch.float32, options=("D",))
    other = torch.randn_like(inputs["u"])
    options = {"reverse": [True], "delta_softplus": True, "backend": backend}
    total = selective_scan(**{**inputs, "u": inputs["u"] + 2 * other}, **options)
    parts = selective_scan(**inputs, **options) + 2 * selective_scan(**{**inputs, "u": other}, **options)
    torch.testing.assert_close(total, parts, rtol=1e-4, atol=1e-4)


def test_shared_tensors_may_be_expanded(backend):
    inputs = make_inputs(2, 1, 9, 20, 1, 4, dtype=torch.float32, options=("D",))
    tokens = {name: v.expand(2, 2, *v.shape[2:]) for name, v in inputs.items() if name not in ("A", "D")}
    rest = {name: inputs[name].expand(2, *inputs[name].shape[1:]) for name in ("A", "D")}
    y = selective_scan(**tokens, **rest, reverse=[False, True], delta_softplus=True, backend=backend)
    for k, reverse in enumerate([False, True]):
        alone = selective_scan(**inputs, reverse=[reverse], delta_softplus=True, backend=backend)
        torch.testing.assert_close(y[:, k], alone[:, 0], rtol=1e-5, atol=1e-5)


SIDE_BY_SIDE = ("u", "delta", "B", "C", "z")


def tokens_side_by_side(t):
    """The same numbers, with the tokens and not the channels or states contiguous."""
    return t.transpose(-1, 2 if t.dim() > 3 else 1).contiguous().transpose(-1, 2 if t.dim() > 3 else 1)


def check_side_by_side(shape, combine, names, backend):
    inputs = make_inputs(*shape, combine=combine, dtype=torch.float32)
    options = {"delta_softplus": True, "reverse": alternating(shape[1]), "combine": combine}
    want = run_with_gradients(in_float64(inputs), **options, backend="reference")
    inputs = {name: tokens_side_by_side(t) if name in names else t for name, t in inputs.items()}
    got = run_with_gradients(inputs, **options, backend=backend)
    assert_close(got, want, torch.float32)
    if "u" in names and min(shape[2:4]) > 1:
        assert got["y"].stride()[-2:] == got["grad_u"].stride()[-2:] == (1, shape[2])


@pytest.mark.parametrize("names", [SIDE_BY_SIDE, ("u",), ("delta", "z"), ("B", "C")], ids=str)
@pytest.mark.parametrize("combine", ["none", "sum"])
@pytest.mark.parametrize("shape", [(2, 2, 37, 40, 2, 3), (1, 2, 16, 33, 1, 16), (1, 2, 1, 3, 1, 1)], ids=str)
def test_tokens_side_by_side(shape, combine, names, backend):
    check_side_by_side(shape, combine, names, backend)


@pytest.mark.parametrize("combine", ["none", "sum"])
def test_every_instruction_set_takes_tokens_side_by_side(combine, instruction_set):
    check_side_by_side((2, 2, 37, 72, 2, 4), combine, SIDE_BY_SIDE, "cpu")


@pytest.mark.skipif("cpu" not in available_backends(), reason="the native backend is not built")
def test_native_results_do_not_depend_on_threads():
    inputs = make_inputs(2, 2, 40, 80, 1, 16, dtype=torch.float32)
    options = {"delta_softplus": True, "reverse": [False, True], "backend": "cpu"}
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(run_with_gradients(inputs, **options))
    finally:
        torch.set_num_threads(threads)
    for name, value in results[0].items():
        assert all(torch.equal(value, other[name]) for other in results[1:]), name


@pytest.mark.parametrize("states", [1, 4])
def test_gradients_of_tiny_steps_keep_their_digits(states, backend):
    """The slope of softplus is no difference of two numbers near one."""
    inputs = make_inputs(1, 2, 20, 16, 1, states, dtype=torch.float32, options=("delta_bias",))
    inputs["delta_bias"] -= 12
    options = {"delta_softplus": True, "reverse": alternating(2)}
    want = run_with_gradients(in_float64(inputs), **options, backend="reference")["grad_delta"]
    got = run_with_gradients(inputs, **options, backend=backend)["grad_delta"].double()
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * want.abs().max().item())


def test_large_steps_neither_overflow_nor_hide_nan(backend):
    inputs = make_inputs(1, 1, 20, 16, 1, 4, dtype=torch.float32, options=("z",))
    inputs["delta"] = inputs["delta"] * 100
    inputs["z"] = inputs["z"] * 200
    y = selective_scan(**inputs, delta_softplus=True, reverse=[False], backend=backend)
    assert y.isfinite().all()
    inputs["delta"][0, 0, 5, 3] = float("nan")
    y = selective_scan(**inputs, delta_softplus=True, reverse=[False], backend=backend)
    assert y[0, 0, 5:, 3].isnan().all()
    assert y[0, 0, :5].isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": torch.zeros(3)}, r"u must be \(b, l, d\) or \(b, k, l, d\), got \(3,\)"),
        ({"u": torch.zeros(2, 0, 4)}, "u must not be empty"),
        ({"delta": torch.zeros(2, 5, 4)}, r"delta must be \(b, k, l, d\) = \(2, 1, 6, 4\), got \(2, 1, 5, 4\)"),
        ({"A": torch.zeros(5, 3)}, r"A must be \(k, d, n\) = \(1, 4, 3\), got \(1, 5, 3\)"),
        ({"B": torch.zeros(2, 6, 2)}, r"B must be"),
        ({"B": torch.zeros(2, 6, 3, 3), "C": torch.zeros(2, 6, 3, 3)}, "divides d = 4, got 3"),
        ({"C": torch.zeros(2, 6, 3, dtype=torch.bfloat16)}, "C must be float32, got bfloat16"),
        ({"A": torch.zeros(4, 3, dtype=torch.float16)}, "A must be float32, got float16"),
        (
            {"u": torch.zeros(2, 6, 4, dtype=torch.int32)},
            "u must be float32 or bfloat16 or float16 or float64, got int32",
        ),
        ({"D": torch.zeros(4, device="meta")}, "D must be on cpu, got meta"),
        ({"z": torch.zeros(2, 6, 5)}, "z must be"),
        ({"reverse": [True]}, None),
        ({"reverse": [True, False]}, "a bool for each of the 1 directions"),
        ({"combine": "product"}, "combine must be 'none', 'sum' or 'mean', got 'product'"),
        ({"backend": "cuda"}, "backend must be 'auto' or one of"),
    ],
)
def test_wrong_input_is_told(change, message):
    inputs = {
        "u": torch.zeros(2, 6, 4),
        "delta": torch.zeros(2, 6, 4),
        "A": torch.zeros(4, 3),
        "B": torch.zeros(2, 6, 3),
        "C": torch.zeros(2, 6, 3),
        **change,
    }
    if message is None:
        selective_scan(**inputs)
        return
    with pytest.raises(ValueError, match=message):
        selective_scan(**inputs)


def canonical(combine, requires_grad=True, **sizes):
    """The tensors of the op itself."""
    inputs = make_inputs(
        **{"b": 2, "k": 2, "l": 9, "d": 20, "g": 2, "n": 4, **sizes}, combine=combine, dtype=torch.float32
    )
    if combine != "none":
        inputs["z"] = inputs["z"].unsqueeze(1)
    return Inputs(**{name: v.requires_grad_(requires_grad) for name, v in inputs.items()})


def assert_fake_strides(op, tensors, options):
    """Compiled code relies on the strides that the fake kernel promises."""
    promised = op(*(t.to("meta") for t in tensors), **options)
    assert [t.stride() for t in op(*tensors, **options)] == [t.stride() for t in promised]


@pytest.mark.parametrize("names", [(), SIDE_BY_SIDE], ids=["channels", "tokens"])
@pytest.mark.parametrize("combine", ["none", "sum"])
def test_opcheck(combine, names, backend):
    inputs = canonical(combine, requires_grad=False)._asdict()
    inputs = {name: tokens_side_by_side(t) if name in names else t for name, t in inputs.items()}
    inputs = Inputs(**{name: t.requires_grad_() for name, t in inputs.items()})
    options = {"reverse": [False, True], "delta_softplus": True, "combine": combine, "backend": backend}
    options["return_last_state"] = True
    torch.library.opcheck(torch.ops.vim.selective_scan, inputs, options)
    plain = tuple(t.detach() for t in inputs)
    torch.library.opcheck(torch.ops.vim.selective_scan_forward, plain, {**options, "save": True})
    y, state, *kept = torch.ops.vim.selective_scan_forward(*plain, **options, save=True)
    grads = (torch.randn_like(y), torch.randn_like(state), *kept)
    assert_fake_strides(torch.ops.vim.selective_scan_backward, (*grads, *plain), options)


@pytest.mark.parametrize("name", ["selective_scan", "selective_scan_forward", "selective_scan_backward"])
def test_arguments_are_those_of_the_schema(name):
    """PyTorch leaves out what is at its default."""
    arguments = getattr(torch.ops.vim, name).default._schema.arguments
    defaults = {a.name: a.default_value for a in arguments if a.has_default_value() and a.name != "save"}
    assert defaults == {**Inputs._field_defaults, **Options._field_defaults}
    own = [a.name for a in arguments if a.name not in ("grad_y", "grad_state", "ungated", "saved", "save")]
    assert own == [*Inputs._fields, *Options._fields]
    assert [a.name for a in arguments if a.kwarg_only and a.name != "save"] == list(Options._fields)


def test_autocast_keeps_the_state_in_float32():
    inputs = make_inputs(1, 1, 12, 16, 1, 4, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = selective_scan(**inputs, delta_softplus=True, reverse=[False], return_last_state=True)
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    rounded = {n: v.bfloat16() if n in ("u", "delta", "B", "C", "z") else v for n, v in inputs.items()}
    torch.testing.assert_close(y, selective_scan(**rounded, delta_softplus=True, reverse=[False]))


def test_inference_mode(backend):
    inputs = make_inputs(2, 2, 9, 20, 1, 4, dtype=torch.float32)
    options = {"delta_softplus": True, "reverse": [False, True], "return_last_state": True, "backend": backend}
    with torch.inference_mode():
        results = selective_scan(**inputs, **options)
    for got, want in zip(results, selective_scan(**inputs, **options), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_gradients_where_no_state_is_returned(backend):
    """The op's empty last state has a gradient too, an empty one."""
    inputs = [t.requires_grad_() for t in scan_inputs()]
    y, state = torch.ops.vim.selective_scan(*inputs, reverse=[False, True], backend=backend)
    assert state.numel() == 0
    got = torch.autograd.grad(y.sum() + state.sum(), inputs, retain_graph=True)
    for grad, want in zip(got, torch.autograd.grad(y.sum(), inputs), strict=True):
        torch.testing.assert_close(grad, want, rtol=0, atol=0)


def test_too_many_directions_are_refused():
    """They would not fit in the number that holds a bit for each."""
    inputs = make_inputs(1, 33, 1, 1, 1, 1, dtype=torch.float32)
    with pytest.raises(ValueError, match="u must have at most 32 directions, got 33"):
        selective_scan(**inputs, reverse=[True] * 33)


def test_meta():
    inputs = {name: value.to("meta") for name, value in make_inputs(2, 2, 7, 24, 1, 4, dtype=torch.float32).items()}
    y, state = selective_scan(**inputs, reverse=[False, True], return_last_state=True)
    assert (y.shape, state.shape, y.device.type) == ((2, 2, 7, 24), (2, 2, 24, 4), "meta")


class Scan(torch.nn.Module):
    def forward(self, u, delta, A, B, C):
        y, _ = torch.ops.vim.selective_scan(u, delta, A, B, C, reverse=[0, 1], delta_softplus=True, combine="mean")
        return y


def scan_inputs(**sizes):
    return [t.detach() for t in canonical("mean", **sizes)[:5]]


def test_compile_sees_one_op():
    torch._dynamo.reset()
    compiled = torch.compile(Scan(), fullgraph=True, backend="aot_eager", dynamic=True)
    for b, l in ((2, 9), (3, 14)):
        inputs = [t.requires_grad_() for t in scan_inputs(b=b, l=l)]
        y, want = compiled(*inputs), Scan()(*inputs)
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
        Scan(), tuple(scan_inputs()), dynamic_shapes=(tokens, tokens, None, tokens, tokens), strict=False
    )
    assert [node.target for node in program.graph.nodes if "scan" in str(node.target)] == [
        torch.ops.vim.selective_scan.default
    ]
    inputs = scan_inputs(b=3, l=30)
    torch.testing.assert_close(program.module()(*inputs), Scan()(*inputs))


def test_torchscript():
    inputs = scan_inputs()
    torch.testing.assert_close(torch.jit.script(Scan())(*inputs), Scan()(*inputs))
