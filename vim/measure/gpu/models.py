"""Models: ours against timm's transformers in bfloat16, at several sizes, in inference and training."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from vim.measure.gpu import card
from vim.measure.gpu.shapes import ModelRun
from vim.measure.gpu.stage import Stage
from vim.measure.models import attention, autocast, build, forward, input_size, train_step
from vim.measure.timing import Run
from vim.measure.videos import JointTransformer

OURS = ("vim", "videomamba", "vmamba", "mambavision", "test_vim", "test_vmamba")
FRAMES = 16  # of the joint transformer's clips


@dataclass(frozen=True)
class ModelTime:
    """One model in one way of running it; see :class:`vim.measure.gpu.shapes.ModelRun`.

    Attributes:
        per_second: images or clips.
        held_mb: allocated before a call: weights, images, the optimizer's state.
        peak_mb: allocated during a call, on top of that.
    """

    name: str
    img_size: int
    batch: int
    run: str
    attention: str
    mode: str
    milliseconds: float
    per_second: float
    held_mb: float
    peak_mb: float


def run(stage: Stage) -> None:
    """Measure every model. To compile kernels, run only ours, and not in graphs of the same kernels."""
    cases: dict[str, Callable[[], ModelTime]] = {
        ", ".join(map(str, case)): partial(measure, stage.clock, case)
        for case in stage.shapes.models
        if not stage.warm or (case.name.startswith(OURS) and case.mode == "eager")
    }
    stage.each(cases)


def measure(clock: card.Clock, case: ModelRun) -> ModelTime:
    """Time a model, which is built for this and freed afterwards."""
    with torch.device(card.DEVICE), attention(fused=case.attention == "fused"):
        model = _build(case)
        image = torch.randn(case.batch, *input_size(model, case.img_size))
        labels = torch.randint(10, (case.batch,))
    context = autocast(card.DEVICE, "bf16")
    if case.run == "forward":
        model.eval()
        call = card.compiled(model, mode="reduce-overhead") if case.mode == "compiled" else model
        step: Run = partial(forward, call, image, context)
    else:
        capturable = case.mode == "graph" and card.DEVICE == "cuda"
        optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-5, capturable=capturable)
        step = partial(train_step, model, optimizer, image, labels, context)
    if case.mode == "graph":
        step = card.graphed(step)
    milliseconds = clock(step)
    return ModelTime(
        *case,
        milliseconds=milliseconds,
        per_second=1e3 * case.batch / milliseconds,
        held_mb=card.allocated_mb(),
        peak_mb=card.peak_mb(step),
    )


def _build(case: ModelRun) -> nn.Module:
    if case.name == "joint_vit":
        return JointTransformer(FRAMES, img_size=case.img_size)
    return build(case.name, case.img_size)
