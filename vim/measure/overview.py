"""The comparisons that the documentation shows."""

import itertools
from functools import partial

from vim.errors import check_installed
from vim.measure.compare import Row
from vim.measure.models import PASSES, compare_models
from vim.measure.ops import compare_layouts, compare_routes, compare_scans, compare_ssd
from vim.measure.videos import compare_clips, compare_decoding

SMALL, TINY = ("vim_small", "deit_small_patch16_224"), ("vim_tiny", "deit_tiny_patch16_224")
STAGED = (
    ("vmamba_tiny_s1l8", "swin_tiny_patch4_window7_224"),
    ("vssd_tiny", "swin_tiny_patch4_window7_224"),
    ("mambavision_t", "convnext_tiny"),
)


def compare_everything(device: str, amp: str) -> list[Row]:
    """Compare ops, models, clips and decoding at sizes that suit the device."""
    measure = partial(compare_models, device=device, amp=amp)
    if device != "cpu":
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
        *measure(SMALL, img_size=224, batch_size=1, rounds=25, passes=PASSES[:1]),
        *measure(SMALL, img_size=224, batch_size=8, rounds=7),
        *measure(TINY, img_size=224, batch_size=1, rounds=15, passes=PASSES[:1]),
        *measure(TINY, img_size=448, batch_size=1, rounds=9, passes=PASSES[:1]),
        *measure(TINY, img_size=896, batch_size=1, rounds=5, passes=PASSES[:1]),
        *measure(TINY, img_size=1248, batch_size=1, rounds=3, passes=PASSES[:1]),
        *[
            row
            for names, batch in itertools.product(STAGED, (1, 8))
            for row in measure(names, img_size=224, batch_size=batch, rounds=9, passes=PASSES[:1])
        ],
        *compare_routes(device, rounds=15),
        *compare_layouts(device, rounds=9),
        *compare_clips(device, rounds=3),
        *compare_decoding(rounds=5),
    ]
