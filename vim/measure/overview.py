"""The comparisons that the documentation shows."""

import itertools
from functools import partial

from vim.errors import check_installed
from vim.kernels import available_backends
from vim.measure.compare import Row
from vim.measure.models import PASSES, compare_models
from vim.measure.ops import compare_layouts, compare_routes, compare_scans, compare_ssd
from vim.measure.profile import compare_with_exponentials
from vim.measure.videos import compare_clips, compare_decoding

SMALL, TINY = ("vim_small", "deit_small_patch16_224"), ("vim_tiny", "deit_tiny_patch16_224")
PEERS = (  # of equal size; the last is timm's
    ("vim_ssd_small", "videomamba_small", "mambar_small", "deit_small_patch16_224"),
    ("vim_s4d_tiny", "deit_tiny_patch16_224"),
    ("vim2_tiny", "vmamba_tiny_s1l8", "vssd_tiny", "swin_tiny_patch4_window7_224"),
    ("mambavision_t", "convnext_s4nd_tiny", "convnext_tiny"),
    ("vit_s4nd_base", "deit_base_patch16_224"),
)


def compare_everything(device: str, amp: str) -> list[Row]:
    """Compare ops, models, clips and decoding at sizes that suit the device."""
    if device != "cpu":
        measure = partial(compare_models, device=device, amp=amp)
        pairs = itertools.product((TINY, SMALL), (224, 512, 1024, 1248))
        return [
            *[row for names, size in pairs for row in measure(names, img_size=size, batch_size=8, rounds=10)],
            *compare_ssd(8, device, rounds=20),
            *compare_routes(device, rounds=20),
            *compare_layouts(device, rounds=20),
            *compare_clips(device, rounds=5),
        ]
    check_installed("av", "sklearn", purpose="the comparison of decoders")
    return [
        *compare_scans(1, device, rounds=15),
        *compare_scans(8, device, rounds=5, passes=["forward"]),  # the loop's backward takes 40 s
        *compare_ssd(1, device, rounds=9),
        *compare_with_peers(device, amp, rounds=9),
        *compare_routes(device, rounds=15),
        *compare_layouts(device, rounds=9),
        *compare_clips(device, rounds=3),
        *compare_decoding(rounds=5),
    ]


def compare_with_peers(device: str, amp: str, rounds: int) -> list[Row]:
    """Compare models of every family with timm's of equal size, and on a CPU the scan with its exponentials."""
    measure = partial(compare_models, device=device, amp=amp, rounds=rounds)
    forward = partial(measure, passes=PASSES[:1])
    native = device == "cpu" and "cpu" in available_backends()
    scans = [row for b in (1, 8) for row in compare_with_exponentials(b, rounds=rounds)] if native else []
    return [
        *scans,
        *forward(SMALL, img_size=224, batch_size=1),
        *measure(SMALL, img_size=224, batch_size=8),
        *[row for size in (224, 448, 896, 1248) for row in forward(TINY, img_size=size, batch_size=1)],
        *[row for names in PEERS for b in (1, 8) for row in forward(names, img_size=224, batch_size=b)],
    ]
