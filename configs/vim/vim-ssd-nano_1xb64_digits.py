"""Vim-Nano with Mamba-2's mixer on the handwritten digits of scikit-learn.

Paper: https://arxiv.org/abs/2405.21060 (Mamba-2; in Vim, with this size and recipe, it is ours).
Command: python tools/train.py configs/vim/vim-ssd-nano_1xb64_digits.py
Hardware: two CPU cores.
Accuracy: 97.8 % of the 360 held-out digits (seed 0; with Mamba's mixer, 98.1 %).
"""

_base_ = ["./vim-nano_1xb64_digits.py"]

model = dict(mixer="ssd", head_dim=32)
