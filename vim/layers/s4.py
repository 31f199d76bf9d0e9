"""S4's and LSSL's kernels: those of systems whose states act on one another.

Sources: https://arxiv.org/abs/2111.00396 (S4), https://arxiv.org/abs/2110.13985 (LSSL).
Sizes: l tokens, d channels, n states, half of which are kept of conjugate pairs, c kernels a channel, s systems, r the
rank.
"""

import math
from typing import Any, get_args

import torch
from timm.layers import register_notrace_function, register_notrace_module
from torch import Tensor, nn

from .checks import check_choice, check_counts
from .factory import Factory
from .hippo import Measure, diagonal, diagonalize, low_rank, transition
from .lti_kernels import LTIKernel, check_bandlimit, reset_log_steps
from .mixer import MixerState
from .norm import matrix_product, residual_dtype

torch.fx.wrap("residual_dtype")
torch.fx.wrap("sum_matrix_powers")


class DenseKernel(LTIKernel):
    """The kernels ``K[k] = C A'^k B'`` of real systems with matrices A, by the bilinear rule: ``A' = (1 - dt A / 2)^-1
    (1 + dt A / 2)``, ``B' = (1 - dt A / 2)^-1 dt B``.

    With k = side i + j, they are products of the sqrt(l) vectors C A'^(side i) with the sqrt(l) vectors A'^j B'. For
    each channel this takes n^2 numbers for A', and n^3 log(l) operations.
    """

    def system(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the steps (d), A (s, n, n), B (s, n) and C (c, d, n), with s a divisor of d."""
        raise NotImplementedError

    def discrete(self, dtype: torch.dtype, rate: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
        """Return A' (d, n, n), B' (d, n) and C (c, d, n); `rate` as for :meth:`forward`."""
        dt, A, B, C = self.system(dtype)
        dt = rate * dt
        copies = len(dt) // len(A)
        half = dt.view(-1, 1, 1) / 2 * A.repeat(copies, 1, 1)
        one = torch.eye(A.shape[-1], device=A.device, dtype=dtype)
        driven = (dt.unsqueeze(1) * B.repeat(copies, 1)).unsqueeze(2)
        solved = torch.linalg.solve(one - half, torch.cat([one + half, driven], dim=2))
        return solved[..., :-1], solved[..., -1], C

    def forward(self, l: int, rate: float = 1.0) -> Tensor:
        """Return the kernels (c, d, l); float32, or float64 in such a model.

        Args:
            rate: what the steps are multiplied by: 2 for a sequence sampled half as often as in training.
        """
        A, B, C = self.discrete(residual_dtype(self.C), rate)
        return sum_matrix_powers(A, B, C, l)

    def step(self, x: Tensor, state: MixerState | None) -> tuple[Tensor, MixerState]:
        """See :meth:`LTIKernel.step`; the state is in two halves, (b, d, n / 2) each."""
        A, B, C = self.discrete(residual_dtype(self.C))
        A, C = A.transpose(1, 2), C.permute(1, 2, 0)
        s = x.new_zeros(len(x), *B.shape, dtype=B.dtype) if state is None else torch.cat(state, dim=-1)
        s, outputs = s.transpose(0, 1), []  # (d, b, n)
        for token in x.to(B.dtype).permute(1, 2, 0):  # (d, b)
            s = matrix_product(s, A) + token.unsqueeze(2) * B.unsqueeze(1)
            outputs.append(matrix_product(s, C).permute(1, 2, 0))  # (b, c, d)
        re, im = s.transpose(0, 1).chunk(2, dim=-1)
        return torch.stack(outputs, dim=1), (re, im)


@register_notrace_function
def sum_matrix_powers(A: Tensor, B: Tensor, C: Tensor, l: int) -> Tensor:
    """Return ``C A^k B`` for k = 0 ... l - 1, as (c, d, l).

    Args:
        A: (d, n, n).
        B: (d, n).
        C: (c, d, n).
    """
    c, d, _ = C.shape
    side = 1
    while side * side < l:
        side *= 2
    near, half = _powers(A, B.unsqueeze(2), side)  # (d, n, side)
    jump = matrix_product(half, half) if side > 1 else A
    far, _ = _powers(jump.transpose(1, 2), C.permute(1, 2, 0), (l + side - 1) // side)  # (d, n, rows c)
    kernel = matrix_product(far.transpose(1, 2), near)  # (d, rows c, side)
    return kernel.view(d, -1, c, side).permute(2, 0, 1, 3).reshape(c, d, -1)[:, :, :l]


def _powers(A: Tensor, v: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return ``A^k v`` for k = 0 ... count - 1 or more, (d, n, k c), and the greatest power of A that they took.

    Args:
        A: (d, n, n).
        v: (d, n, c).
    """
    taken = 1
    while taken < count:
        if taken > 1:
            A = matrix_product(A, A)
        v = torch.cat([v, matrix_product(A, v)], dim=2)
        taken *= 2
    return v, A


@register_notrace_module
class S4Kernel(DenseKernel):
    """The kernels of diagonal plus low-rank systems, ``A = diag(L) - sum_r P_r P_r*``; parameters under S4's names.

    L = -exp(A_real) - i A_imag, for the m kept states; with their conjugates, the system is real. The published code
    keeps ``C (1 - A'^l)`` for the one length l that its buffer `l_kernel` names. Here `C` itself is kept, for all
    lengths, and :meth:`load_state_dict` takes both.

    Args:
        init: of A, P and B, a HiPPO matrix: "legs", "legt" or "fout".
        d_model, d_state, channels, n_ssm, dt_min, dt_max, B_clip, bandlimit: see :class:`S4DKernel`. The published
            `B_clip` makes B another than the HiPPO matrix's; None keeps that. States beyond the band act on the others,
            but are not read.

    Raises:
        ValueError: see :class:`S4DKernel`.
    """

    DYNAMICS = ("inv_dt", "A_real", "A_imag", "B", "P")

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 64,
        channels: int = 1,
        init: Measure = "legs",
        n_ssm: int | None = 1,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        B_clip: float | None = 2.0,
        bandlimit: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        s = d_model if n_ssm is None else n_ssm
        check_counts(d_model=d_model, d_state=d_state, channels=channels, n_ssm=s)
        check_choice("init", init, get_args(Measure))
        if d_model % s:
            raise ValueError(f"n_ssm must divide the {d_model} channels, got {s}")
        check_bandlimit(bandlimit)
        self.d_state, self.init, self.B_clip, self.bandlimit = d_state, init, B_clip, bandlimit
        self.dt_min, self.dt_max = dt_min, dt_max
        m, rank, dd = d_state // 2, len(low_rank(init, d_state)), Factory(device=device, dtype=dtype)
        self.inv_dt = nn.Parameter(torch.empty(d_model, 1, **dd))  # S4's name for log(dt)
        self.A_real = nn.Parameter(torch.empty(s, m, **dd))
        self.A_imag = nn.Parameter(torch.empty(s, m, **dd))
        self.B = nn.Parameter(torch.empty(1, s, m, 2, **dd))
        self.P = nn.Parameter(torch.empty(rank, s, m, 2, **dd))
        self.C = nn.Parameter(torch.empty(channels, d_model, m, 2, **dd))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the steps and C anew, and set A, P and B to those of the HiPPO matrix."""
        reset_log_steps(self.inv_dt, self.dt_min, self.dt_max)
        A, B = diagonal(self.init, self.d_state, B_clip=self.B_clip)
        P = diagonalize(self.init, self.d_state).P
        self.A_real.copy_((-A.real).log().expand_as(self.A_real))
        self.A_imag.copy_(A.imag.expand_as(self.A_imag))
        self.B.copy_(torch.view_as_real(B.conj().resolve_conj()).expand_as(self.B))
        self.P.copy_(torch.view_as_real(P.conj().resolve_conj()).unsqueeze(1).expand_as(self.P))
        nn.init.normal_(self.C, std=math.sqrt(0.5))

    def system(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See :meth:`DenseKernel.system`: the real and the imaginary parts of the kept states, one after the other."""
        re, im = torch.diag_embed(-torch.exp(self.A_real.to(dtype))), torch.diag_embed(-self.A_imag.to(dtype))
        A = torch.cat([torch.cat([re, -im], dim=2), torch.cat([im, re], dim=2)], dim=1)
        P = torch.cat(self.P.to(dtype).unbind(-1), dim=-1)  # (r, s, n)
        A = A - 2 * (P.unsqueeze(3) * P.unsqueeze(2)).sum(0)
        B = torch.cat(self.B.to(dtype).squeeze(0).unbind(-1), dim=-1)
        C, dt = self.C.to(dtype), torch.exp(self.inv_dt.to(dtype))
        if self.bandlimit is not None:
            turn = dt * self.A_imag.to(dtype).abs().repeat(len(dt) // len(self.A_imag), 1)
            C = C * (turn <= math.pi * self.bandlimit).unsqueeze(-1)
        return dt.squeeze(1), A, B, torch.cat([2 * C[..., 0], -2 * C[..., 1]], dim=-1)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        length = int(state_dict.pop(f"{prefix}l_kernel", 0))
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        if length > 0:
            with torch.no_grad():
                A, _, C = self.discrete(torch.float64)
                one = torch.eye(A.shape[-1], device=A.device, dtype=A.dtype)
                kept = torch.linalg.solve(one - torch.linalg.matrix_power(A, length), C.transpose(0, 1), left=False)
                re, im = kept.transpose(0, 1).chunk(2, dim=-1)
                self.C.copy_(torch.stack([re / 2, -im / 2], dim=-1))


@register_notrace_module
class LSSLKernel(DenseKernel):
    """The kernels of LSSL's fixed HiPPO system: a reference, of n^2 numbers a channel.

    Args:
        measure: "legs", "legt" or "fout".
        d_model, d_state, channels, dt_min, dt_max: see :class:`S4DKernel`.
    """

    DYNAMICS = ("log_dt",)
    A: Tensor
    B: Tensor

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 64,
        channels: int = 1,
        measure: Measure = "legs",
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_counts(d_model=d_model, channels=channels)
        self.measure, self.dt_min, self.dt_max = measure, dt_min, dt_max
        A, B = transition(measure, d_state)
        dd = Factory(device=device, dtype=dtype)
        self.register_buffer("A", torch.empty(1, *A.shape, **dd), persistent=False)
        self.register_buffer("B", torch.empty(1, *B.shape, **dd), persistent=False)
        self.log_dt = nn.Parameter(torch.empty(d_model, **dd))
        self.C = nn.Parameter(torch.empty(d_model, channels, d_state, **dd))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the steps and C anew, and set A and B to the HiPPO matrix."""
        A, B = transition(self.measure, self.C.shape[2])
        self.A.copy_(A)
        self.B.copy_(B)
        reset_log_steps(self.log_dt, self.dt_min, self.dt_max)
        nn.init.normal_(self.C)

    def system(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See :meth:`DenseKernel.system`."""
        C = self.C.to(dtype).transpose(0, 1)
        return torch.exp(self.log_dt.to(dtype)), self.A.to(dtype), self.B.to(dtype), C
