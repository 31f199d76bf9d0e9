"""Forward mode, and the transforms of torch.func, of every op."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

from tests.kernels import test_conv1d, test_scan, test_ssd
from vim.kernels import causal_conv1d, rms_norm, selective_scan, ssd


def scan(combine, options=test_scan.OPTIONAL, **keywords):
    inputs = test_scan.make_inputs(2, 2, 6, 4, 2, 3, combine, options=options)
    if "delta_bias" not in options:
        inputs["delta"] = inputs["delta"].abs()
    return selective_scan, inputs, {"reverse": [False, True], "combine": combine, **keywords}


def duality():
    options = {"reverse": [False, True], "combine": "mean", "dt_softplus": True, "return_last_state": True}
    return ssd, test_ssd.make_inputs(2, 2, 6, 2, 2, 1, 3, "mean"), options


def conv(silu, bias):
    inputs = test_conv1d.make_inputs(2, 2, 6, 4, 3, torch.float64, bias)
    return causal_conv1d, inputs, {"silu": silu, "reverse": [True, False]}


def norm():
    draw = torch.Generator().manual_seed(0)
    sizes = {"x": (2, 6, 4), "weight": (4,)}
    return rms_norm, {n: torch.randn(s, generator=draw, dtype=torch.float64) for n, s in sizes.items()}, {"eps": 1e-3}


CASES = {
    "scan": scan("none", delta_softplus=True, return_last_state=True),
    "scan-mean": scan("mean", delta_softplus=True, return_last_state=True),
    "scan-sum": scan("sum", ("D", "z")),
    "scan-bare": scan("none", ()),
    "ssd": duality(),
    "conv": conv(True, True),
    "conv-bare": conv(False, False),
    "norm": norm(),
}


@pytest.fixture(params=CASES)
def case(request, backend):
    """A function of an op's tensors, and the tensors: float64, or what the backend takes."""
    op, inputs, options = CASES[request.param]
    dtype = torch.float32 if backend == "cpu" else torch.float64
    names, tensors = list(inputs), [t.to(dtype) for t in inputs.values()]

    def run(*tensors):
        """One sum of all outputs that tells their elements apart."""
        out = op(**dict(zip(names, tensors, strict=True)), **options, backend=backend)
        return sum((y * torch.arange(1, y.numel() + 1).view(y.shape).sin()).sum() for y in as_tuple(out))

    run.elements = lambda *tensors: as_tuple(op(**dict(zip(names, tensors, strict=True)), **options, backend=backend))
    return run, tensors


def as_tuple(x):
    return x if isinstance(x, tuple) else (x,)


def drawn_like(tensors):
    draw = torch.Generator().manual_seed(1)
    return [torch.randn(t.shape, generator=draw, dtype=torch.float64).to(t.dtype) for t in tensors]


def differences(run, tensors, tangents):
    """The directional derivative of each of a function's outputs."""
    step = 1e-6 if tensors[0].dtype == torch.float64 else 1e-2
    ahead, behind = (run(*(t + s * v for t, v in zip(tensors, tangents, strict=True))) for s in (step, -step))
    return [(a - b) / (2 * step) for a, b in zip(as_tuple(ahead), as_tuple(behind), strict=True)]


def assert_near(got, want):
    for a, b in zip(as_tuple(got), want, strict=True):
        tolerance = 1e-7 if a.dtype == torch.float64 else 1e-2
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * b.abs().max().clamp_min(1).item())


def gradients(run, tensors):
    leaves = [t.clone().requires_grad_() for t in tensors]
    return torch.autograd.grad(run(*leaves), leaves)


def test_forward_mode_equals_differences(case):
    run, tensors = case
    tangents = drawn_like(tensors)
    want = differences(run.elements, tensors, tangents)
    y, tangent = jvp(run.elements, tuple(tensors), tuple(tangents))
    assert_near(tangent, want)
    for a, b in zip(y, run.elements(*tensors), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, v) for t, v in zip(tensors, tangents, strict=True)]
        for y, expected in zip(run.elements(*duals), tangent, strict=True):
            torch.testing.assert_close(forward_ad.unpack_dual(y).tangent, expected)


def test_the_tangent_of_one_tensor_is_enough(case):
    run, tensors = case
    for i, tensor in enumerate(tensors):
        (tangent,) = drawn_like([tensor])

        def of_one(t, i=i):
            return run.elements(*tensors[:i], t, *tensors[i + 1 :])

        assert_near(jvp(of_one, (tensor,), (tangent,))[1], differences(of_one, [tensor], [tangent]))


def test_forward_mode_equals_reverse_mode(case):
    run, tensors = case
    want = gradients(run, tensors)
    x = tensors[0]
    row = jacfwd(lambda x: run(x, *tensors[1:]))(x)
    assert_near(row, [want[0]])
    _, along = linearize(lambda x: run(x, *tensors[1:]), x)
    (v,) = drawn_like([x])
    assert_near(along(v), [(want[0] * v).sum()])


def test_gradients_of_each_sample_equal_a_loop(case):
    run, tensors = case
    samples = [torch.stack([t, 0.5 * t, -t if i == 0 else t]) for i, t in enumerate(tensors)]
    got = vmap(grad(run, argnums=tuple(range(len(tensors)))))(*samples)
    for n in range(3):
        for a, b in zip(got, gradients(run, [s[n] for s in samples]), strict=True):
            torch.testing.assert_close(a[n], b)


def test_gradients_of_shared_weights_for_each_sample(case):
    """Only the first tensor has samples, along its last dimension."""
    run, (x, *weights) = case
    samples = torch.stack([x, 0.5 * x], -1)
    dims = (-1, *[None] * len(weights))
    got = vmap(grad(run, argnums=tuple(range(len(dims)))), in_dims=dims)(samples, *weights)
    values = vmap(run, in_dims=dims)(samples, *weights)
    for n in range(2):
        torch.testing.assert_close(values[n], run(samples[..., n], *weights))
        for a, b in zip(got, gradients(run, [samples[..., n], *weights]), strict=True):
            torch.testing.assert_close(a[n], b)


def test_gradients_of_a_mapped_function(case):
    """The map inside the gradient, and a gradient outside of torch.func."""
    run, (x, *weights) = case
    want = gradients(run, [x, *weights])[0]

    def mapped(x):
        return vmap(run, in_dims=(0, *[None] * len(weights)))(x, *weights).sum()

    assert_near(grad(mapped)(torch.stack([x, x])), [torch.stack([want, want])])
    samples = torch.stack([x, x]).requires_grad_()
    assert_near(torch.autograd.grad(mapped(samples), samples)[0], [torch.stack([want, want])])


def test_jacobian_in_chunks(case):
    run, (x, *weights) = case

    def rows(x):
        return run.elements(x, *weights)[0].flatten()[:5]

    want = torch.stack([torch.autograd.grad(rows(t := x.clone().requires_grad_())[i], t)[0] for i in range(5)])
    assert_near(jacrev(rows, chunk_size=2)(x), [want])
    assert_near(jacfwd(rows)(x), [want])


@pytest.mark.parametrize("order", ["forward over reverse", "reverse over reverse", "reverse over forward"])
def test_second_derivatives_equal_differences(case, order):
    run, (x, *weights) = case
    (v,) = drawn_like([x])

    def of_x(x):
        return run(x, *weights).sin()

    want = differences(lambda x: gradients(of_x, [x]), [x], [v])
    if order == "forward over reverse":
        got = jvp(grad(of_x), (x,), (v,))[1]
    elif order == "reverse over reverse":
        got = grad(lambda x: (grad(of_x)(x) * v).sum())(x)
    else:
        got = grad(lambda x: jvp(of_x, (x,), (v,))[1])(x)
    assert_near(got, want)


def test_hessian():
    x = torch.randn(3, dtype=torch.float64)

    def run(x):
        return rms_norm(x, torch.ones(3, dtype=torch.float64), eps=1e-2)[0]

    want = torch.stack([differences(lambda x: gradients(run, [x]), [x], [v])[0] for v in torch.eye(3).double()])
    torch.testing.assert_close(hessian(run)(x), want, rtol=0, atol=1e-6)


def test_other_second_derivatives_are_refused(case):
    """They are no zeros."""
    run, (x, *weights) = case
    x, once = x.clone().requires_grad_(), "differentiated once"

    def of_x(x):
        return run(x, *weights)

    (first,) = torch.autograd.grad(of_x(x), x, create_graph=True)
    with pytest.raises(RuntimeError, match=once):
        torch.autograd.grad(first.square().sum(), x)
    with pytest.raises(RuntimeError, match=once):
        torch.autograd.functional.jvp(of_x, x.detach(), torch.ones_like(x))
    one = torch.ones((), dtype=x.dtype)
    with pytest.raises(RuntimeError, match=once):
        jvp(vjp(of_x, x.detach())[1], (one,), (one,))


@pytest.mark.parametrize("transform", ["per sample", "forward mode"])
def test_compiled_transforms(transform):
    torch._dynamo.reset()
    run, tensors, _ = scan("mean", delta_softplus=True)
    names, tensors = list(tensors), [t.contiguous() for t in tensors.values()]

    def loss(*tensors):
        inputs = dict(zip(names, tensors, strict=True))
        return run(**inputs, reverse=[False, True], combine="mean", delta_softplus=True).square().sum()

    if transform == "per sample":
        f = vmap(grad(loss))
        arguments = [torch.stack([t, 2 * t]) for t in tensors]
    else:

        def f(*tensors):
            return jvp(loss, tensors, tuple(torch.ones_like(t) for t in tensors))

        arguments = tensors
    got = torch.compile(f, fullgraph=True, backend="aot_eager")(*arguments)
    torch.testing.assert_close(got, f(*arguments))


def test_autocast_in_transforms():
    inputs = test_scan.make_inputs(1, 1, 12, 16, 1, 4, dtype=torch.float32)

    def loss(u):
        y = selective_scan(**{**inputs, "u": u}, delta_softplus=True, reverse=[False])
        assert y.dtype == torch.bfloat16
        return y.float().sum()

    u = inputs["u"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want = gradients(loss, [u])[0]
        got, tangent = grad(loss)(u), jvp(loss, (u,), (torch.ones_like(u),))[1]
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(tangent, want.sum(), rtol=0.02, atol=0.02 * want.abs().sum().item())
