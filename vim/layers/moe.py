"""Mixtures of feed-forward experts behind Mamba blocks. Experimental: no published vision result exists.

Sources: https://arxiv.org/abs/2308.00951 (Soft MoE), https://arxiv.org/abs/2101.03961 (Switch), and for experts between
Mamba blocks, of language, https://arxiv.org/abs/2401.04081.
Sizes: b images, l tokens, d channels, e experts, p slots of an expert, c places at an expert, h hidden channels.
"""

import inspect
import math
from collections.abc import Sequence
from typing import Any, Literal, TypedDict, Unpack

import torch
import torch.nn.functional as F
from timm.layers import DropPath, register_notrace_module
from torch import Tensor, nn

from .checks import check_choice, check_counts
from .factory import Factory
from .norm import RMSNorm, matrix_product, residual_dtype
from .s6 import reset_uniform

torch.fx.wrap("residual_dtype")
torch.fx.wrap("matrix_product")

HIDDEN = 4  # h / d, as in transformers
NOT_DECAYED_EXPERTS = ("up_bias", "down_bias")

Router = Literal["soft", "top1"]


class MoEOptions(TypedDict, total=False):
    """Options of :class:`SoftMixture` or :class:`SwitchMixture`, and which of them; None is the default."""

    num_experts: int | None
    router: Router | None
    num_slots: int | None
    capacity_factor: float | None
    aux_weight: float | None


class Experts(nn.Module):
    """Two linear layers with GELU between them, for each expert its own, in one product for all experts."""

    def __init__(self, dim: int, num_experts: int, **dd: Unpack[Factory]) -> None:
        super().__init__()
        self.up_weight = nn.Parameter(torch.empty(num_experts, dim, HIDDEN * dim, **dd))
        self.up_bias = nn.Parameter(torch.empty(num_experts, HIDDEN * dim, **dd))
        self.down_weight = nn.Parameter(torch.empty(num_experts, HIDDEN * dim, dim, **dd))
        self.down_bias = nn.Parameter(torch.empty(num_experts, dim, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter anew, as PyTorch's linear layers do."""
        reset_uniform(self.up_weight.shape[1], self.up_weight, self.up_bias)
        reset_uniform(self.down_weight.shape[1], self.down_weight, self.down_bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (b, e, n, d), n inputs of each expert, to the same."""
        b = x.shape[0]
        x = x.transpose(0, 1).flatten(1, 2)  # (e, b n, d)
        hidden = F.gelu(torch.baddbmm(self.up_bias.unsqueeze(1), x, self.up_weight))
        y = torch.baddbmm(self.down_bias.unsqueeze(1), hidden, self.down_weight)
        return y.unflatten(1, (b, -1)).transpose(0, 1)


@register_notrace_module
class SoftMixture(nn.Module):
    """Each expert gets slots, which are weighted means of an image's tokens; each token, one of all slots' outputs.

    No token is dropped and no expert left out. The slots are not as many as the tokens, so the same parameters do for
    images of any size.

    Args:
        dim: d.
        num_experts: e.
        num_slots: p.
    """

    def __init__(self, dim: int, *, num_experts: int = 8, num_slots: int = 16, **dd: Unpack[Factory]) -> None:
        check_counts(num_experts=num_experts, num_slots=num_slots)
        super().__init__()
        self.num_experts, self.num_slots = num_experts, num_slots
        self.slots = nn.Parameter(torch.empty(dim, num_experts * num_slots, **dd))
        self.scale = nn.Parameter(torch.empty(1, **dd))
        self.experts = Experts(dim, num_experts, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the router's parameters anew."""
        nn.init.normal_(self.slots)  # only their directions matter
        nn.init.ones_(self.scale)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Map (b, l, d) to the same; nothing has to balance the experts."""
        dtype = residual_dtype(x)
        directions = F.normalize(self.slots.to(dtype), dim=0) * self.scale.to(dtype)
        logits = matrix_product(F.normalize(x.to(dtype), dim=-1), directions)  # (b, l, e p)
        dispatch, combine = logits.softmax(1).to(x.dtype), logits.softmax(2).to(x.dtype)
        slots = dispatch.transpose(1, 2) @ x
        y = self.experts(slots.unflatten(1, (self.num_experts, self.num_slots)))
        return combine @ y.flatten(1, 2), None


@register_notrace_module
class SwitchMixture(nn.Module):
    """Each token goes to the expert of its highest probability, whose output is multiplied by that probability.

    An expert has c = capacity_factor l / e places for the tokens of an image, rounded up, which are taken in the order
    of the sequence. A token without a place has an output of zero. So no image's output depends on another image.

    Args:
        dim: d.
        num_experts: e.
        capacity_factor: places for an image's tokens, divided by the tokens, in thousandths.
        aux_weight: alpha of the loss that balances the experts.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_experts: int = 8,
        capacity_factor: float = 1.25,
        aux_weight: float = 0.01,
        **dd: Unpack[Factory],
    ) -> None:
        check_counts(num_experts=num_experts)
        if not (isinstance(capacity_factor, int | float) and 0.001 <= capacity_factor < math.inf):
            raise ValueError(f"capacity_factor must be a number of at least 0.001, got {capacity_factor!r}")
        if not (isinstance(aux_weight, int | float) and 0 <= aux_weight < math.inf):
            raise ValueError(f"aux_weight must be a number of at least 0, got {aux_weight!r}")
        super().__init__()
        self.num_experts, self.aux_weight = num_experts, float(aux_weight)
        self.capacity = round(1000 * capacity_factor)  # whole, so that exporters follow sizes that it makes
        self.router = nn.Parameter(torch.empty(dim, num_experts, **dd))
        self.experts = Experts(dim, num_experts, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the router's parameters anew, as PyTorch's linear layers do."""
        reset_uniform(self.router.shape[0], self.router)

    def idle_parameters(self) -> int:
        """Return how many parameters a token's output does not depend on: those of all experts but one."""
        of_experts = sum(parameter.numel() for parameter in self.experts.parameters())
        return of_experts - of_experts // self.num_experts

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Map (b, l, d) to the same; in training also return the loss that balances the experts, alpha e sum(f P).

        f is the fraction of a batch's tokens that chose an expert, and P the mean of its probabilities. The loss is
        alpha where all experts are chosen equally often and have the same probabilities, and alpha e where one has all.
        """
        (b, l, d), dtype = x.shape, residual_dtype(x)
        e, places = self.num_experts, -(-l * self.capacity // (1000 * self.num_experts))  # rounded up
        probabilities = matrix_product(x.to(dtype), self.router.to(dtype)).softmax(-1)  # (b, l, e)
        probability, expert = probabilities.max(-1)
        chosen = F.one_hot(expert, e)  # (b, l, e)
        place = (chosen.cumsum(1) * chosen).sum(-1) - 1  # (b, l)
        # the tokens without a place share one more, behind those of the experts
        place = torch.where(place < places, expert * places + place, e * places).unsqueeze(-1).expand(b, l, d)
        inputs = x.new_zeros(b, e * places + 1, d).scatter(1, place, x)[:, :-1]
        outputs = self.experts(inputs.unflatten(1, (e, places))).flatten(1, 2)
        y = F.pad(outputs, (0, 0, 0, 1)).gather(1, place) * probability.unsqueeze(-1)
        if not self.training:
            return y, None
        fraction = chosen.to(probabilities.dtype).mean((0, 1))
        return y, self.aux_weight * e * (fraction * probabilities.mean((0, 1))).sum()


ROUTERS: dict[Router, type[SoftMixture | SwitchMixture]] = {"soft": SoftMixture, "top1": SwitchMixture}


class ExpertBlock(nn.Module):
    """``x + drop_path(mixture(norm(x)))``, on a float32 residual stream.

    Attributes:
        aux_loss: what balances the experts, of the last batch in training, and zero before; None for "soft", where
            nothing has to.
    """

    aux_loss: Tensor | None

    def __init__(self, norm: RMSNorm, mixture: SoftMixture | SwitchMixture, *, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm = norm
        self.mixture = mixture
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.aux_loss = torch.zeros(()) if isinstance(mixture, SwitchMixture) else None

    def __getstate__(self) -> dict[str, object]:
        """Leave the loss of a batch out of copies: it belongs to a graph, which PyTorch does not copy."""
        return {**self.__dict__, "aux_loss": None if self.aux_loss is None else torch.zeros(())}

    def forward(self, residual: Tensor) -> Tensor:
        """Map (b, l, d), float32, to the same."""
        y, aux_loss = self.mixture(self.norm(residual))
        y = self.drop_path(y)
        # Behind all that the backward pass needs. Gradient checkpointing, which computes the block again, stops before:
        # a second loss would hold the block's activations until the next batch.
        if aux_loss is not None:
            self.aux_loss = aux_loss
        return residual + y


def expert_blocks(
    dim: int, rates: Sequence[float], every: int | None, options: MoEOptions, **dd: Unpack[Factory]
) -> list[ExpertBlock | None]:
    """Return for each Mamba block the experts behind it, or None.

    Args:
        rates: of stochastic depth, for each block.
        every: each so many-th block has experts behind it; None for no experts.

    Raises:
        ValueError: there are options without experts, or the router does not have them, or one is out of range.
    """
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    if every is None:
        for name, value in given.items():
            raise ValueError(f"{name} must be left out without moe_every, got {value!r}")
        return [None] * len(rates)
    check_counts(moe_every=every)
    if every > len(rates):
        raise ValueError(f"moe_every must be at most the depth, {len(rates)}, got {every}")
    router: Router = given.pop("router", "soft")
    check_choice("router", router, tuple(ROUTERS))
    for name in given.keys() - inspect.signature(ROUTERS[router]).parameters.keys():
        raise ValueError(f"{name} must be left out with router={router!r}, got {given[name]!r}")
    return [
        ExpertBlock(RMSNorm(dim, **dd), ROUTERS[router](dim, **given, **dd), drop_path=rate) if i % every == 0 else None
        for i, rate in enumerate(rates, 1)
    ]
