"""HiPPO matrices, which remember a signal in polynomials or waves, and the spectra that S4 and S4D start from.

Sources: https://arxiv.org/abs/2008.07669 (HiPPO), https://arxiv.org/abs/2111.00396 (S4, the normal plus low-rank form),
https://arxiv.org/abs/2206.12037 (Fourier), https://arxiv.org/abs/2206.11893 (S4D).
A system is x' = A x + B u, y = C x, with n states, half of which are kept of a diagonal form: the others are their
conjugates. All is computed in float64 on the CPU, also where a model is built on another device.
"""

import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from .checks import check_choice

Measure = Literal["legs", "legt", "fout"]
Spectrum = Literal["legs", "legt", "fout", "lin", "inv", "inv2", "quad", "real", "rand"]
SLOWEST = 1e-4  # the least decay of a state that starts without any, as FouT's and LegT's


class DiagonalForm(NamedTuple):
    """A system in the basis V of eigenvectors of its normal part: diag(A) - sum_r P_r P_r*, complex128.

    A has positive imaginary parts in ascending order. The first component of each eigenvector that is not zero is real
    and positive: otherwise the phases of P and B would be the linear algebra library's choice.
    """

    A: Tensor  # (n / 2)
    P: Tensor  # (r, n / 2)
    B: Tensor  # (n / 2)
    V: Tensor  # (n, n / 2)


def transition(measure: Measure, n: int) -> tuple[Tensor, Tensor]:
    """Return A (n, n) and B (n): Legendre polynomials scaled or translated, or Fourier waves translated.

    Raises:
        ValueError: no such measure, or n is odd.
    """
    check_choice("measure", measure, get_args(Measure))
    if n < 2 or n % 2:
        raise ValueError(f"n must be even and at least 2, got {n}")
    order = torch.arange(n, dtype=torch.float64, device="cpu")
    root = torch.sqrt(2 * order + 1)
    both = torch.outer(root, root)
    if measure == "legs":
        return -torch.tril(both, -1) - torch.diag(order + 1), root
    if measure == "legt":
        signs = torch.where((order[:, None] - order) % 2 == 0, 1.0, -1.0)
        return -0.5 * both * torch.where(order[:, None] >= order, 1.0, signs), 0.5 * root
    B = torch.zeros_like(order)
    B[0], B[2::2] = 1, math.sqrt(2)
    waves = torch.zeros_like(order)
    waves[2::2] = math.pi * order[1 : n // 2]
    A = torch.diag(waves[:-1], -1)
    return A - A.T - torch.outer(B, B), B


def low_rank(measure: Measure, n: int) -> Tensor:
    """Return P (r, n), for which A + sum_r P_r P_r^T is normal: a multiple of the identity plus a skew matrix."""
    _, B = transition(measure, n)
    if measure == "fout":
        return B.unsqueeze(0)
    order = torch.arange(n, dtype=torch.float64, device="cpu")
    if measure == "legs":
        return torch.sqrt(order + 0.5).unsqueeze(0)
    odd = order % 2
    return torch.sqrt(order + 0.5) * torch.stack([odd, 1 - odd])


def diagonalize(measure: Measure, n: int) -> DiagonalForm:
    """Return the diagonal plus low-rank form of :func:`transition`."""
    A, B = transition(measure, n)
    P = low_rank(measure, n)
    normal = A + P.T @ P
    real = normal.diagonal().mean()
    imaginary, V = torch.linalg.eigh(-1j * (normal - real * torch.eye(n, dtype=A.dtype, device="cpu")))
    imaginary, V = imaginary[n // 2 :], V[:, n // 2 :]
    if measure == "fout":  # two eigenvalues are zero, whose eigenvectors are any; these two are conjugates
        V[:, 0] = 0
        V[0, 0], V[1, 0] = math.sqrt(0.5), -1j * math.sqrt(0.5)
    first = V.gather(0, (V.abs() > 1e-9).int().argmax(0, keepdim=True))
    V = V * (first.conj() / first.abs())
    return DiagonalForm(
        torch.complex(real.expand_as(imaginary), imaginary), P.to(V.dtype) @ V.conj(), V.mH @ B.to(V.dtype), V
    )


def diagonal(init: Spectrum, n: int, *, B_clip: float | None = 2.0) -> tuple[Tensor, Tensor]:
    """Return A and B of a diagonal system, complex128, (n / 2) each.

    Args:
        init: "legs", "legt" and "fout" leave out the low-rank part of a HiPPO matrix; "lin", "inv", "inv2" and "quad"
            are S4D's approximations of such spectra, and "real" Mamba's, with B = 1. "rand" draws the frequencies.
        B_clip: the largest imaginary part of B, which the published code clips for HiPPO matrices. It changes their
            kernels by more than half; None keeps the theory's B.
    """
    check_choice("init", init, get_args(Spectrum))
    if init in get_args(Measure):
        A, _, B, _ = diagonalize(init, n)  # type: ignore[arg-type]
        A = torch.complex(A.real.clamp(max=-SLOWEST), A.imag)
        return A, B if B_clip is None else torch.complex(B.real, B.imag.clamp(-B_clip, B_clip))
    if n < 2 or n % 2:
        raise ValueError(f"n must be even and at least 2, got {n}")
    order = torch.arange(n // 2, dtype=torch.float64, device="cpu")
    real, imaginary = torch.full_like(order, -0.5), torch.zeros_like(order)
    if init == "lin":
        imaginary = math.pi * order
    elif init == "inv":
        imaginary = n / math.pi * (n / (2 * order + 1) - 1)
    elif init == "inv2":
        imaginary = n / math.pi * (n / (order + 1) - 1)
    elif init == "quad":
        imaginary = (1 + 2 * order) ** 2 / math.pi
    elif init == "real":
        real = -(order + 1)
    else:
        imaginary = torch.randn_like(order).exp()
    A = torch.complex(real, imaginary)
    return A, torch.ones_like(A)
