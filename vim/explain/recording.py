"""What the scans of a model select for given images: recorded from the calls of the ops, for every family.

Sizes: b images, l tokens, d channels, n states, g groups of B and C, k directions, w taps.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from vim.errors import UserError
from vim.kernels.scan.reference import Inputs, Options
from vim.kernels.ssd import reference as ssd
from vim.layers import Mamba2Mixer, MambaMixer, SelectiveTokenMixer, Stage

from .frozen import in_this_thread
from .matrices import Selection

Mixer = MambaMixer | Mamba2Mixer | SelectiveTokenMixer


@dataclass
class Recorded:
    """The calls of one mixer.

    Attributes:
        mixer: the mixer itself.
        arguments: of its forward function.
        scan: what it gave to the scan; of Mamba-2, with a channel for each head.
        convolution: of Mamba, the input (b, k, l, d), taps (k, d, w) and bias of its causal convolution.
        gate: of Mamba, (b, l, d), the gate before its SiLU.
        gated: (b, l, d), what the output projection takes.
    """

    mixer: Mixer
    arguments: tuple[Any, ...] = ()
    scan: tuple[Inputs, Options] | None = None
    convolution: tuple[Tensor, Tensor, Tensor | None] | None = None
    gate: Tensor | None = None
    gated: Tensor | None = None

    @property
    def grid(self) -> tuple[int, int] | None:
        """Rows and columns of a mixer's map; None for a mixer of sequences."""
        return self.arguments[0].shape[1:3] if isinstance(self.mixer, SelectiveTokenMixer) else None


class _Calls(TorchFunctionMode):
    """Keeps the arguments of a mixer's ops. The model runs as without it."""

    def __init__(self) -> None:
        super().__init__()
        self.current: Recorded | None = None
        self.done: list[Recorded] = []

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run a function, and keep the arguments of a scan or a causal convolution."""
        kwargs = kwargs or {}
        if self.current is not None:
            if function is torch.ops.vim.selective_scan:
                self.current.scan = _given(Inputs, Options, args, kwargs)
            elif function is torch.ops.vim.ssd:
                self.current.scan = _of_heads(*_given(ssd.Inputs, ssd.Options, args, kwargs))
            elif function is torch.ops.vim.causal_conv1d and isinstance(self.current.mixer, MambaMixer):
                self.current.convolution = (*args, None)[:3]  # type: ignore[assignment]
        return function(*args, **kwargs)

    def hooks(self, mixer: Mixer) -> list[RemovableHandle]:
        """Have a mixer recorded from now on."""
        one = Recorded(mixer)

        def start(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            one.arguments, self.current = arguments, one

        def keep_gate(_: nn.Module, arguments: tuple[Any, ...], projected: Tensor) -> None:
            one.gate = projected.chunk(2, dim=-1)[1] if isinstance(mixer, MambaMixer) else None

        def end(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            (one.gated,), self.current = arguments, None
            self.done.append(one)

        return [
            mixer.register_forward_pre_hook(in_this_thread(start)),
            mixer.in_proj.register_forward_hook(in_this_thread(keep_gate)),
            mixer.out_proj.register_forward_pre_hook(in_this_thread(end)),
        ]


class Part(NamedTuple):
    """Where the tensors of one run are in those of a scan: a run goes in one direction along one route."""

    images: slice
    direction: int
    channels: slice
    path: Tensor  # (l,), the indices of the tokens along the route


class Run(NamedTuple):
    """One run of a scan.

    Attributes:
        selected: in the order in which it goes.
        reverse: whether it goes from the end of the route to its start.
    """

    part: Part
    selected: Selection
    reverse: bool


def _given(inputs: Any, options: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return the tensors and the options of an op's call by name."""
    tensors = {key: value for key, value in kwargs.items() if key in inputs._fields}
    return inputs(*args, **tensors), options(**{key: value for key, value in kwargs.items() if key not in tensors})


def _of_heads(inputs: ssd.Inputs, options: ssd.Options) -> tuple[Inputs, Options]:
    """Return a scan with a channel for each head, which holds the mean of the head's channels: they have one matrix."""
    dt = inputs.dt.to(inputs.A.dtype)
    dt = dt if inputs.dt_bias is None else dt + inputs.dt_bias.unsqueeze(1)
    dt = (F.softplus(dt) if options.dt_softplus else dt).clamp(options.dt_min, options.dt_max)
    A = inputs.A.unsqueeze(-1).expand(-1, -1, inputs.B.shape[4])
    D = None if inputs.D is None else inputs.D.mean(-1)
    values, B, C = (t.to(dt.dtype) for t in (inputs.x.mean(-1), inputs.B, inputs.C))
    return Inputs(values, dt, A, B, C, D), Options(options.reverse, combine=options.combine)


def num_scanning_layers(model: nn.Module) -> int:
    """Return how many mixers of a model have scans that go along its tokens."""
    return sum(isinstance(module, Mixer) for module in model.modules())


@contextmanager
def recorded(model: nn.Module, layers: Sequence[int] | None = None) -> Iterator[list[Recorded]]:
    """Inside this context, record a run of the model: a list that it fills in the order in which its mixers run.

    Args:
        layers: indices of the mixers of tokens, also from the end; None for all.

    Raises:
        UserError: the model has no mixer of tokens that scans, or dilated stages, or no such layer.
    """
    mixers = [module for module in model.modules() if isinstance(module, Mixer)]
    if any(getattr(module, "directions", "") == "hydra" for module in mixers):
        raise UserError("hidden attention of directions='hydra' is not offered: use method 'lrp' or 'gradcam'")
    if not mixers:
        raise UserError(
            f"hidden attention needs a model whose tokens are scanned (Vim, VideoMamba, Mamba-R, VMamba, ViM2), "
            f"got {type(model).__name__}: use method 'lrp' or 'gradcam'"
        )
    if any(isinstance(module, Stage) and module.dilation > 1 for module in model.modules()):
        raise UserError(
            "hidden attention of dilated stages is not offered: build the model without output_stride, which has the "
            "same weights, or use method 'lrp' or 'gradcam'"
        )
    count = len(mixers)
    if layers is not None and not layers:
        raise UserError(f"layers must name at least one of {count} layers, got none")
    for layer in layers or ():
        if not -count <= layer < count:
            raise UserError(f"layers must be between {-count} and {count - 1}, got {layer}")
    chosen = mixers if layers is None else [mixers[i] for i in sorted({layer % count for layer in layers})]
    calls = _Calls()
    with ExitStack() as stack:
        for mixer in chosen:
            for hook in calls.hooks(mixer):
                stack.callback(hook.remove)
        with calls:
            yield calls.done


def runs(one: Recorded) -> list[Run]:
    """Return the runs of a mixer's scan."""
    assert one.scan is not None
    inputs, options = one.scan
    d, g = inputs.u.shape[3], inputs.B.shape[3]
    found = []
    for part in parts(one):
        images, k, channels, _ = part
        dt = inputs.delta[images, k][..., channels].to(inputs.A.dtype)
        dt = dt if inputs.delta_bias is None else dt + inputs.delta_bias[k, channels]
        dt = F.softplus(dt) if options.delta_softplus else dt
        A = inputs.A[k, channels]
        B, C = (t[images, k].to(dt.dtype) for t in (inputs.B, inputs.C))
        D = dt.new_zeros(A.shape[0]) if inputs.D is None else inputs.D[k, channels]
        reverse = bool(options.reverse[k])
        if reverse:
            dt, B, C = (t.flip(1) for t in (dt, B, C))
        B, C = (t.unsqueeze(3).expand(-1, -1, -1, d // g, -1).flatten(2, 3)[:, :, channels] for t in (B, C))
        found.append(Run(part, Selection(dt, A, B, C, D), reverse))
    return found


def parts(one: Recorded) -> list[Part]:
    """Return where the runs of a mixer's scan are: one for each direction, and for each route through an image."""
    assert one.scan is not None
    _, k, l, d = one.scan[0].u.shape
    whole, in_order = slice(None), torch.arange(l, device=one.scan[0].u.device)
    if one.grid is not None:
        routes = (slice(d // 2), in_order), (slice(d // 2, None), in_order.view(one.grid).t().flatten())
        return [Part(whole, direction, channels, path) for direction in range(k) for channels, path in routes]
    paths = one.arguments[1] if len(one.arguments) > 1 else None
    if paths is None:
        return [Part(whole, direction, whole, in_order) for direction in range(k)]
    # a direction's second scan is a second image
    return [Part(slice(i // k, None, len(paths) // k), i % k, whole, path) for i, path in enumerate(paths)]
