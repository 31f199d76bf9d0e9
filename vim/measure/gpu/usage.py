"""The ops as models run them: torch.compile, CUDA graphs, mixed precision, gradient checkpointing."""

from collections.abc import Callable
from functools import partial

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vim.kernels import causal_conv1d, rms_norm, selective_scan
from vim.measure.gpu.card import DEVICE, graphed
from vim.measure.gpu.check import Check, compare, new_seed
from vim.measure.gpu.inputs import Named, Op, draw_conv, draw_scan, draw_ssd, duality, results
from vim.measure.gpu.shapes import Conv, Scan, Ssd
from vim.measure.models import autocast
from vim.models import Vim

TOLERANCE = {"no": 1e-3, "fp16": 1e-2, "bf16": 5e-2}  # of a whole model


def cases(scan: Scan, duality: Ssd, model: str) -> dict[str, Callable[[], Check]]:
    """The checks by name, for both scans along two directions and a model."""
    return {
        **{f"torch.compile{_named(shape)}": partial(check_compiled, shape) for shape in (scan, duality)},
        **{f"CUDA graph{_named(shape)}": partial(check_graph, shape) for shape in (scan, duality)},
        **{f"{model}, amp {amp}": partial(check_model, model, amp) for amp in TOLERANCE},
        "checkpointing": partial(check_checkpointing, model),
    }


def check_compiled(shape: Scan | Ssd) -> Check:
    """Check the ops of a layer in one graph without breaks against the same ops without torch.compile."""
    seed = new_seed()
    layer, inputs = draw_layer(shape, seed)
    compiled = torch.compile(layer, fullgraph=True, backend="inductor" if DEVICE == "cuda" else "aot_eager")
    runs = [results(compiled, inputs, seed, shape.dtype) for _ in range(2)]
    want = results(layer, inputs, seed, shape.dtype)
    return compare(f"torch.compile{_named(shape)}", shape.dtype, seed, runs, want)


def check_graph(shape: Scan | Ssd) -> Check:
    """Check the replay of a CUDA graph whose input has changed against a call."""
    seed = new_seed()
    layer, inputs = draw_layer(shape, seed)
    y: list[Tensor] = []

    def call() -> None:
        y[:] = layer(**inputs)

    runs = []
    with torch.no_grad():
        replay = graphed(call)
        inputs["x"].copy_(inputs["x"].flip(1))
        for _ in range(2):
            replay()
            runs.append({"output": y[0].clone()})
        want = layer(**inputs)[0]
    return compare(f"CUDA graph{_named(shape)}", shape.dtype, seed, runs, {"output": want})


def _named(shape: Scan | Ssd) -> str:
    return ", ssd" if isinstance(shape, Ssd) else ""


def check_model(name: str, amp: str) -> Check:
    """Check a whole model, its loss's gradients included, against the same model in float32 on the CPU."""
    seed = new_seed()
    model, image = draw_model(name, seed)
    want = model_results(model, image, "no")
    model, image = model.to(DEVICE), image.to(DEVICE)
    runs = [model_results(model, image, amp) for _ in range(2)]
    return compare(f"{name}, amp {amp}", amp, seed, runs, want, tolerance=TOLERANCE[amp])


def check_checkpointing(name: str) -> Check:
    """Check that gradient checkpointing changes no bit."""
    seed = new_seed()
    model, image = draw_model(name, seed)
    model, image = model.to(DEVICE), image.to(DEVICE)
    plain = model_results(model, image, "bf16")
    model.set_grad_checkpointing()
    recomputed = model_results(model, image, "bf16")
    return compare("checkpointing", "bf16", seed, [recomputed, plain], plain, tolerance=TOLERANCE["bf16"])


def scan_layer(x: Tensor, weight: Tensor, taps: Tensor, **rest: Tensor) -> tuple[Tensor, ...]:
    """Norm, convolution and a scan along both directions, as a block has them.

    Args:
        x: (b, l, d).
        taps: (2, d, w).
        rest: the inputs of the scan but u.
    """
    u = rms_norm(x, weight, backend="triton").unsqueeze(1).expand(-1, 2, -1, -1)
    u = causal_conv1d(u, taps, reverse=[False, True], backend="triton")
    y = selective_scan(
        u, **rest, delta_softplus=True, reverse=[False, True], combine="mean", return_last_state=False, backend="triton"
    )
    assert isinstance(y, Tensor)  # no last state was asked for
    return (y,)


def draw_layer(shape: Scan | Ssd, seed: int) -> tuple[Op, Named]:
    """Return the ops of a layer with one of the scans, and their inputs."""
    if isinstance(shape, Ssd):
        return partial(duality, shape, "triton"), draw_ssd(shape, seed, DEVICE)
    inputs = draw_scan(shape, seed, DEVICE)
    x = inputs.pop("u")[:, 0].contiguous()  # (b, l, d)
    taps = draw_conv(Conv(1, shape.k, 1, shape.d, dtype=shape.dtype), seed, DEVICE)["weight"]
    return scan_layer, {"x": x, "weight": torch.ones_like(x[0, 0]), "taps": taps, **inputs}


def draw_model(name: str, seed: int) -> tuple[Vim, Tensor]:
    """Return a model with random weights, on the CPU, and two images."""
    torch.manual_seed(seed)
    model, cfg = timm.create_model(name), timm.get_pretrained_cfg(name)
    assert isinstance(model, Vim) and cfg is not None
    return model, torch.randn(2, *cfg.input_size)


def model_results(model: nn.Module, image: Tensor, amp: str) -> Named:
    """Return the logits, and the gradients of all parameters as one vector."""
    with autocast(image.device.type, amp)():
        logits = model(image).float()
    loss = F.cross_entropy(logits, torch.arange(len(image), device=image.device))
    grads = torch.autograd.grad(loss, list(model.parameters()))
    return {"logits": logits.detach(), "gradient": torch.cat([grad.float().flatten() for grad in grads])}
