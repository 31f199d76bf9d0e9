"""The compute of a forward pass, counted on the meta device: without weights, data or time.

PyTorch's counter knows matrix products, convolutions and attention; of this package's ops it counts nothing, unless it
has :data:`FORMULAS`. They also work with PyTorch's counter alone::

    with FlopCounterMode(custom_mapping=FORMULAS) as counter:
        model(image)

Only forward passes are counted: there is no accepted count for the scan's backward pass.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import timm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import vim  # noqa: F401  registers the ops and the models
import vim.kernels.scan.states  # noqa: F401  registers an op that has a formula
from vim.errors import UserError, describe
from vim.layers import S6
from vim.layers.moe import SwitchMixture
from vim.registry import check_name
from vim.typing import VisionModel

Shape = Sequence[int]
Flops = Mapping[object, int]  # by op


def _scan_flops(u: Shape, delta: Shape, A: Shape, *others: object, **options: object) -> int:
    """9 b k l d n, for u (b, k, l, d) and A (k, d, n), as Mamba's author estimates. D and the gate are not counted.

    Source: https://github.com/state-spaces/mamba/issues/110.
    """
    b, k, l, d = u
    return 9 * b * k * l * d * A[-1]


def _ssd_flops(x: Shape, dt: Shape, A: Shape, B: Shape, *others: object, **options: object) -> int:
    """5 b k l h p n, for x (b, k, l, h, p) and B (b, k, l, g, n): Mamba-2's recurrence, token by token.

    Of a state, the product with the decay, that of input and B, their sum, and the product with C and its sum. Products
    of matrices, which compute the same in chunks, take more. D and the gate are not counted.
    """
    b, k, l, h, p = x
    return 5 * b * k * l * h * p * B[-1]


def _conv_flops(x: Shape, weight: Shape, *others: object, **options: object) -> int:
    """2 b k l d w, for x (b, k, l, d) and w taps. Bias and SiLU are not counted, as in PyTorch's convolutions."""
    b, k, l, d = x
    return 2 * b * k * l * d * weight[-1]


# A scan has several names: the counter sees the first in inference mode, the second under autograd and the third in
# published code, never two for one scan.
_SCANS: dict[object, Callable[..., int]] = {
    torch.ops.vim.selective_scan: _scan_flops,
    torch.ops.vim.selective_scan_forward: _scan_flops,
    torch.ops.vim.selective_scan_with_states: _scan_flops,
    torch.ops.vim.ssd: _ssd_flops,
    torch.ops.vim.ssd_forward: _ssd_flops,
}
KERNEL = re.compile(r"\.kernels\.\d+$")  # the modules that make S4ND's
FORMULAS = {**_SCANS, torch.ops.vim.causal_conv1d: _conv_flops}


@dataclass(frozen=True)
class Counts:
    """The compute of one forward pass. Norms, activations, gates and sums are not counted.

    Attributes:
        published_macs: multiply-adds as in the published figures, which call them FLOPs. What they count differs by
            family, `model.published_compute`. "projections": matrix products and convolutions, except those between a
            mixer's input and output projections, because fvcore does not see into Mamba's fused kernel
            (https://github.com/OpenGVLab/VideoMamba/issues/18). "scans" (VMamba): all products, and as many more as
            the scans have FLOPs; the products that project steps without the zeros by which ours joins the routes.
            "layers" (MambaVision): all products but attention's. "images" (S4ND): all but those that make kernels,
            which a batch shares; FFTs are not counted.
        macs: multiply-adds of all matrix products and convolutions.
        scan_flops: FLOPs of the scans, for each image, direction, token, channel and state 9, with Mamba-2's mixer 5.
    """

    published_macs: int
    macs: int
    scan_flops: int

    @property
    def flops(self) -> int:
        """All that is counted: 2 FLOPs for each multiply-add, and the scans."""
        return 2 * self.macs + self.scan_flops


@dataclass(frozen=True)
class Cost:
    """A model's parameters and the compute of one forward pass; see :class:`Counts`.

    Attributes:
        active_parameters: those that one token's features depend on: of the experts of a "top1" router, one.
        input: the size of an image or clip, such as 3x224x224.
        tokens: of an image or clip; "-" for a model of maps.
    """

    model: str
    parameters: int
    active_parameters: int
    input: str
    tokens: int | str
    batch_size: int
    published_macs: int
    macs: int
    scan_flops: int
    flops: int


def count(model: nn.Module, input_size: Sequence[int], batch_size: int = 1) -> Counts:
    """Count one forward pass of a model, in its present mode, on inputs of `input_size`: (c, h, w) or (c, t, h, w).

    The model is not changed or moved: a copy without data runs. A mixer is a module that scans and has an `in_proj` and
    an `out_proj`.

    Raises:
        Exception: whatever the model raises for inputs of this size.
    """
    tensors = [*model.named_parameters(), *model.named_buffers()]
    stand_in = {name: tensor.detach().to("meta") for name, tensor in tensors}
    dtype = next((tensor.dtype for tensor in model.parameters()), None)
    image = torch.empty(batch_size, *input_size, dtype=dtype, device="meta")
    with torch.inference_mode(), FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        torch.func.functional_call(model, stand_in, image)
    flops = counter.get_flop_counts()
    everything = flops.get("Global", {})
    products = _products(everything)
    scans = sum(everything.values()) - products
    published = {
        "projections": products - _between(flops, "in_proj", "out_proj", scans=True),
        "scans": products - _zeros(model, flops) + 2 * scans,
        "layers": products - _between(flops, "qkv", "proj", scans=False),
        "images": products - sum(_products(own) for name, own in flops.items() if KERNEL.search(name)),
    }[getattr(model, "published_compute", "projections")]
    return Counts(published_macs=published // 2, macs=products // 2, scan_flops=scans)


def cost_of(name: str, img_size: int | None = None, batch_size: int = 1, **options: Any) -> Cost:
    """Build a timm model without weights, and count its parameters and one forward pass.

    Args:
        img_size: height and width in pixels; by default the model's.
        options: of the model.

    Raises:
        UserError: there is no such model, or it cannot run at this size or with these options.
    """
    check_name(name)
    try:
        cfg = timm.get_pretrained_cfg(name)
        assert cfg is not None
        with torch.device("meta"):
            if img_size and cfg.fixed_input_size:  # other models take any size
                options["img_size"] = img_size
            model = timm.create_model(name, **options)
        model = cast(VisionModel, model.eval())
        size = (*cfg.input_size[:-2], img_size, img_size) if img_size else cfg.input_size
        frames = getattr(model, "num_frames", None)
        shape = (size[0], frames, *size[1:]) if frames else size  # timm's input_size has no time
        counts = count(model, shape, batch_size)
        features: object = model.forward_features(torch.empty(1, *shape, device="meta"))
    except Exception as error:  # models raise many kinds
        raise UserError(f"cannot run {name} at {img_size or 'its own'} pixels: {describe(error)}") from error
    parameters = sum(parameter.numel() for parameter in model.parameters())
    idle = sum(module.idle_parameters() for module in model.modules() if isinstance(module, SwitchMixture))
    return Cost(
        model=name,
        parameters=parameters,
        active_parameters=parameters - idle,
        input="x".join(map(str, shape)),
        tokens=features.shape[1] if isinstance(features, Tensor) and features.ndim == 3 else "-",
        batch_size=batch_size,
        **asdict(counts),
        flops=counts.flops,
    )


def _products(flops: Flops) -> int:
    """The FLOPs of everything but the scans."""
    return sum(number for op, number in flops.items() if op not in _SCANS)


def _between(flops: Mapping[str, Flops], first: str, last: str, *, scans: bool) -> int:
    """The FLOPs of products between two projections of modules that have both, and scan or do not.

    Args:
        flops: by module and op.
    """
    between = 0
    for name, own in flops.items():
        projections = [f"{name}.{first}", f"{name}.{last}"]
        if bool(_SCANS.keys() & own.keys()) == scans and flops.keys() >= set(projections):
            between += _products(own) - sum(_products(flops[projection]) for projection in projections)
    return between


def _zeros(model: nn.Module, flops: Mapping[str, Flops]) -> int:
    """The FLOPs of products with zeros: of g routes, one matrix with g blocks projects the steps.

    Args:
        flops: by module and op.
    """
    zeros = 0
    for name, module in model.named_modules():
        if isinstance(module, S6):
            routes = module.dt_weight.shape[1]
            zeros += _products(flops[f"{type(model).__name__}.{name}"]) * (routes - 1) // routes
    return zeros
