"""HiPPO matrices and the spectra that kernels start from."""

import pytest
import torch

from tests.golden.lti import GOLDEN, deviation
from vim.layers.hippo import diagonal, diagonalize, low_rank, transition

MEASURES = ["legs", "legt", "fout"]


@pytest.mark.parametrize("measure", MEASURES)
def test_matrices(measure):
    want = GOLDEN["hippo"][measure]
    A, B = transition(measure, 8)
    for got, numbers in ((A, want["A"]), (B, want["B"]), (low_rank(measure, 8), want["dplr"]["P"])):
        assert got.dtype == torch.float64
        assert deviation(got, numbers) < 1e-11


@pytest.mark.parametrize("measure", MEASURES)
def test_what_no_phase_changes(measure):
    form, want = diagonalize(measure, 8), GOLDEN["hippo"][measure]["dplr"]
    assert deviation(form.A.imag, want["imag_ascending"][4:]) < 1e-8
    assert (form.A.real - want["real_part"]).abs().max() < 1e-14
    kept = slice(5 if measure == "fout" else 4, None)  # Fourier's states of frequency zero: any pair of vectors
    for got, name in (
        (form.B.abs() ** 2, "abs2_B_tilde"),
        (form.P[0].abs() ** 2, "abs2_P_tilde_row0"),
        ((form.B * form.P[0].conj()).real, "real_part_of_B_tilde_conj_P_tilde_row0"),
    ):
        if name in want:
            assert deviation(got[kept.start - 4 :], want[name][kept]) < 1e-8, name


@pytest.mark.parametrize("n", [2, 8, 64])
@pytest.mark.parametrize("measure", MEASURES)
def test_the_form_and_its_conjugate_are_the_matrix(measure, n):
    A, B = transition(measure, n)
    form = diagonalize(measure, n)
    V, P = torch.cat([form.V, form.V.conj()], 1), torch.cat([form.P, form.P.conj()], 1)
    assert (V.mH @ V - torch.eye(n)).abs().max() < 1e-12
    assert deviation((V @ (torch.diag(torch.cat([form.A, form.A.conj()])) - P.mT @ P.conj()) @ V.mH).real, A) < 1e-12
    assert deviation((V @ torch.cat([form.B, form.B.conj()])).real, B) < 1e-12
    first = form.V.gather(0, (form.V.abs() > 1e-9).int().argmax(0, keepdim=True))
    assert (first.real > 0).all() and first.imag.abs().max() < 1e-14


def test_spectrum_of_64_states():
    want, form = GOLDEN["hippo"]["legs_64"], diagonalize("legs", 64)
    assert deviation(form.A.imag[:8], want["imag_positive_ascending_first8"]) < 1e-8
    assert deviation(form.A.imag.flip(0)[:4], want["imag_largest4"]) < 1e-8
    assert deviation(form.B.abs()[:8] ** 2, want["abs2_B_tilde_of_the_8_smallest_positive"]) < 1e-8


@pytest.mark.parametrize(("n", "clipped", "largest"), [(8, 1, 5.15399), (16, 3, 10.21808), (64, 11, 40.75183)])
def test_the_published_clip(n, clipped, largest):
    _, B = diagonal("legs", n, B_clip=None)
    assert B.imag.abs().max().item() == pytest.approx(largest, rel=1e-5)
    _, published = diagonal("legs", n)
    changed = published != B
    assert changed.sum() == clipped
    assert (published.imag[changed].abs() == 2).all() and (published.real == B.real).all()


def test_every_state_decays():
    for init in ("legs", "legt", "fout", "lin", "inv", "inv2", "quad", "real", "rand"):
        A, B = diagonal(init, 16)
        assert A.shape == B.shape == (8,) and A.dtype == B.dtype == torch.complex128
        assert A.real.max() <= -1e-4 and A.imag.min() >= 0, init


@pytest.mark.parametrize("n", [0, 7])
def test_refusals(n):
    for call in (lambda: transition("legs", n), lambda: diagonal("lin", n), lambda: diagonalize("fout", n)):
        with pytest.raises(ValueError, match="must be even and at least 2"):
            call()
    with pytest.raises(ValueError, match="measure must be one of"):
        transition("lagt", 8)
    with pytest.raises(ValueError, match="init must be one of"):
        diagonal("lagt", 8)
