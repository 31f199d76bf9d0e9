import time

import pytest
import timm
import torch
from torch import nn

from vim.kernels.native import library
from vim.measure import profile
from vim.measure.overview import PEERS, SMALL, TINY


def test_ops_belong_to_the_outermost_part():
    x, weight = torch.randn(1, 2, 300, 64), torch.randn(2, 64, 4)

    def run():
        time.sleep(0.05)
        torch.ops.vim.causal_conv1d(x.double(), weight.double(), reverse=[0, 1])  # the reference, of many ops
        nn.functional.silu(x)

    times = profile.parts_of(run)
    assert {part for part, taken in times.items() if taken} == {"convolutions", profile.OTHER, profile.BETWEEN}
    assert times[profile.BETWEEN] >= 0.05


@pytest.mark.skipif(library.load() is None, reason="not built")
def test_the_parts_of_a_model(monkeypatch):
    monkeypatch.setattr(profile, "build", lambda name, img_size: timm.create_model("vim_nano", img_size=224, depth=1))
    _, _, *parts, last = (line.rsplit(maxsplit=4) for line in profile.profile_small(rounds=1).splitlines())
    assert last[0].startswith(profile.BOUND)
    shares = {name: [float(share.rstrip("%")) for share in row] for name, *row in parts}
    for column in range(4):
        assert sum(share[column] for share in shares.values()) == pytest.approx(100, abs=1)
        assert all(share[column] > 0 for part, share in shares.items() if part not in ("optimizer", profile.BETWEEN))
    assert shares["optimizer"][:2] == [0, 0] and min(shares["optimizer"][2:]) > 0


@pytest.mark.skipif(library.load() is None, reason="not built")
def test_scans_beside_their_exponentials(monkeypatch):
    monkeypatch.setattr(profile, "BLOCK", (5, 16, 4, 2))
    asked = []
    monkeypatch.setattr(profile, "call", lambda function, count: asked.append((function, count)))
    rows = profile.compare_with_exponentials(3, rounds=1)
    assert [row.run for row in rows] == ["forward"] * 2 + ["forward+backward"] * 2
    assert {row.baseline for row in rows} == {"its exponentials"}
    # 3 images of 5 tokens of 16 channels: in each of 2 directions 4 decays and a step size, and one gate
    assert set(asked) == {("vim_exponentials", 3 * 5 * 16 * (2 * 5 + 1))}


@pytest.mark.parametrize("names", [SMALL, TINY, *PEERS], ids=lambda names: names[-1])
def test_peers_are_of_equal_size(names):
    with torch.device("meta"):
        sizes = [sum(p.numel() for p in timm.create_model(name).parameters()) for name in names]
    assert max(sizes) <= 1.35 * min(sizes)
