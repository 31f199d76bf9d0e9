"""A small VideoMamba on short videos of handwritten digits that move up, down, left or right.

Paper: https://arxiv.org/abs/2403.06977 (the architecture; this size, recipe and data are ours).
Command: python tools/train.py configs/videomamba/videomamba-test_digit-motion.py
Hardware: two CPU cores.
Accuracy: 99.6 % of the 500 held-out clips (100 % in another run), after three minutes.
"""

_base_ = [
    "../_base_/datasets/digit_motion.py",
    "../_base_/schedules/adamw_cosine.py",
    "../_base_/runtime.py",
]

model = dict(
    model_name="test_videomamba",
    num_frames=8,
    scan_order="temporal_first",
    init="corrected",
    in_chans=1,
    num_classes=4,
    img_size=32,
    patch_size=8,
)
optimizer = dict(lr=2e-3)
schedule = dict(num_epochs=6, warmup_epochs=1)
