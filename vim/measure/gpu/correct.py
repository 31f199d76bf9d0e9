"""Correct: outputs and gradients of every op against float64, the same bits twice, and every way a model runs them.

Inputs are drawn anew in each run. Fresh memory is NaN, so that an element that a kernel does not write shows.
"""

import os
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from vim.kernels import causal_conv1d, rms_norm, selective_scan
from vim.measure.gpu import large, usage
from vim.measure.gpu.card import DEVICE
from vim.measure.gpu.check import Check, compare, new_seed
from vim.measure.gpu.inputs import (
    Named,
    Op,
    alternating,
    draw_conv,
    draw_norm,
    draw_scan,
    draw_ssd,
    duality,
    in_float64,
    results,
)
from vim.measure.gpu.shapes import Conv, Norm, Scan, Ssd
from vim.measure.gpu.stage import Stage


def run(stage: Stage) -> None:
    """Check every op at every shape and whole models; then, in the first process only, tensors of 2^31 elements."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS may not repeat its bits
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    torch.backends.cudnn.allow_tf32 = False
    shapes = stage.shapes
    cases: dict[str, Callable[[], Check]] = {
        "reference": partial(check_reference, shapes.scans[0]),
        **{f"scan {shape}": partial(check_scan, shape) for shape in shapes.scans},
        **{f"ssd {shape}": partial(check_ssd, shape) for shape in shapes.ssds},
        **{f"conv {shape}": partial(check_conv, shape) for shape in shapes.convs},
        **{f"norm {shape}": partial(check_norm, shape) for shape in shapes.norms},
        **usage.cases(shapes.scans[0], shapes.ssds[0], shapes.checked_model),
    }
    stage.each(cases)
    stage.each(large.cases(shapes.large), shared=False)


def check_reference(shape: Scan) -> Check:
    """Check the chunked scan in float64 on the GPU against the loop over tokens in float64 on the CPU."""
    shape, seed = shape._replace(b=1, dtype="float64"), new_seed()
    inputs = draw_scan(shape, seed, "cpu")
    inputs = in_float64(inputs)
    there = {name: tensor.to(DEVICE) for name, tensor in inputs.items()}
    got = results(partial(scan, shape, "chunked"), there, seed, "float64")
    want = results(partial(scan, shape, "reference"), inputs, seed, "float64")
    return compare("reference", "float64", seed, [{name: tensor.cpu() for name, tensor in got.items()}], want)


def check_scan(shape: Scan) -> Check:
    """Check the scan against the chunked backend, which :func:`check_reference` checks."""
    seed = new_seed()
    inputs = draw_scan(shape, seed, DEVICE)
    return check_op(f"scan {shape}", shape.dtype, seed, inputs, partial(scan, shape), "chunked")


def check_ssd(shape: Ssd) -> Check:
    """Check state space duality against the chunked backend."""
    seed = new_seed()
    inputs = draw_ssd(shape, seed, DEVICE)
    return check_op(f"ssd {shape}", shape.dtype, seed, inputs, partial(duality, shape), "chunked")


def check_conv(shape: Conv) -> Check:
    """Check the convolution."""
    seed = new_seed()
    inputs = draw_conv(shape, seed, DEVICE)
    return check_op(f"conv {shape}", shape.dtype, seed, inputs, partial(conv, shape), "reference")


def check_norm(shape: Norm) -> Check:
    """Check the normalisation."""
    seed = new_seed()
    return check_op(f"norm {shape}", shape.dtype, seed, draw_norm(shape, seed, DEVICE), norm, "reference")


def check_op(case: str, dtype: str, seed: int, inputs: Named, op: Op, reference: str) -> Check:
    """Compare an op's Triton backend, run twice, with another backend on the same values in float64."""
    runs = [results(partial(op, "triton"), inputs, seed, dtype) for _ in range(2)]
    want = results(partial(op, reference), in_float64(inputs), seed, dtype)
    return compare(case, dtype, seed, runs, want)


def scan(shape: Scan, backend: str, **inputs: Tensor) -> tuple[Tensor, ...]:
    """Return y and the last state."""
    out = selective_scan(
        **inputs,
        delta_softplus="delta_bias" in shape.given,
        reverse=alternating(shape.k),
        combine=shape.combine,
        return_last_state=True,
        backend=backend,
    )
    assert isinstance(out, tuple)
    return out


def conv(shape: Conv, backend: str, **inputs: Tensor) -> tuple[Tensor, ...]:
    """Return the convolution."""
    return (causal_conv1d(**inputs, silu=shape.full, reverse=alternating(shape.k), backend=backend),)


def norm(backend: str, **inputs: Tensor) -> tuple[Tensor, ...]:
    """Return the normalised rows."""
    return (rms_norm(**inputs, eps=1e-5, backend=backend),)
