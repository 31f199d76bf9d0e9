"""What the native kernels of state space duality read and write."""

import pytest
import torch

from tests.kernels.test_scan import alternating, assert_close, in_float64
from tests.kernels.test_ssd import make_inputs, run
from vim.kernels import available_backends, ssd
from vim.kernels.ssd import native

pytestmark = pytest.mark.skipif("cpu" not in available_backends(), reason="the native backend is not built")
MARGIN, GUARD = 64, 7.0
ODD = [(2, 2, 67, 6, 5, 2, 3), (1, 3, 129, 5, 33, 1, 17), (1, 1, 1, 1, 3, 1, 1), (2, 1, 16, 3, 7, 3, 66)]


@pytest.fixture
def allocated(monkeypatch):
    """The memory around each tensor that new_empty returns, all of it GUARD."""
    new_empty, margins = torch.Tensor.new_empty, []

    def guarded(self, *sizes, **options):
        shape = new_empty(self, *sizes, device="meta").shape
        memory = self.new_full((shape.numel() + 2 * MARGIN,), GUARD, **options)
        margins.extend((memory[:MARGIN], memory[-MARGIN:]))
        return memory[MARGIN:-MARGIN].fill_(torch.nan).view(shape)

    monkeypatch.setattr(torch.Tensor, "new_empty", guarded)
    return margins


def between_nan(value):
    """The same numbers as a view into memory that holds NaN on all sides of every token."""
    memory = value.new_full([size + 2 for size in value.shape], torch.nan)
    view = memory[tuple(slice(1, -1) for _ in value.shape)]
    return view.copy_(value)


def ssd_between_nan(**arguments):
    return ssd(**{name: between_nan(a) if isinstance(a, torch.Tensor) else a for name, a in arguments.items()})


@pytest.mark.parametrize("combine", ["none", "sum"])
@pytest.mark.parametrize("shape", ODD, ids=str)
def test_no_more_is_read_and_written(shape, combine, instruction_set, allocated):
    inputs = make_inputs(*shape, combine=combine, dtype=torch.float32)
    options = {"dt_softplus": True, "reverse": alternating(shape[1]), "combine": combine}
    want = run(in_float64(inputs), scan=ssd, **options, backend="reference")
    allocated.clear()
    assert_close(run(inputs, scan=ssd_between_nan, **options, backend="cpu"), want, torch.float32)
    assert allocated and all((margin == GUARD).all() for margin in allocated)


@pytest.mark.parametrize("directions", [1, 3])
def test_heads_of_a_task_do_not_change_results(directions):
    """A forward pass divides its heads by the number of threads, a backward pass by the shapes alone."""
    inputs = make_inputs(1, directions, 70, 6, 64, 1, 16, dtype=torch.float32)
    reverse, threads, results, pieces = alternating(directions), torch.get_num_threads(), [], set()
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append(run(inputs, scan=ssd, dt_softplus=True, reverse=reverse, backend="cpu"))
            pieces.add(native._piece(native.Inputs(**inputs), native.Options(reverse)))
    finally:
        torch.set_num_threads(threads)
    assert len(pieces) > 1
    for name, value in results[0].items():
        assert all(torch.equal(value, other[name]) for other in results[1:]), name
