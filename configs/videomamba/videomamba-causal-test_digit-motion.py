"""A small VideoMamba that scans forwards only, so that it can take moving digits as a stream, two frames at a time.

Paper: https://arxiv.org/abs/2403.06977 (the architecture; one direction, this size, recipe and data are ours).
Command: python tools/train.py configs/videomamba/videomamba-causal-test_digit-motion.py
Hardware: two CPU cores.
Accuracy: 100 % of the 500 held-out clips (seed 0).
"""

_base_ = ["./videomamba-test_digit-motion.py"]

data = dict(video=dict(num_frames=16))
# patches of two frames show the direction; with one frame in a patch, this recipe stays at chance
model = dict(directions="none", scan_order="spatial_first", tubelet_size=2, num_frames=16)
