"""Vim-Nano on the handwritten digits of scikit-learn.

Paper: https://arxiv.org/abs/2401.09417 (the architecture; this size and recipe are ours).
Command: python tools/train.py configs/vim/vim-nano_1xb64_digits.py
Hardware: two CPU cores.
Accuracy: 98 to 99 % of the 360 held-out digits, after two to three minutes on two CPU cores.
"""

_base_ = ["../_base_/datasets/digits.py", "../_base_/schedules/adamw_cosine.py", "../_base_/runtime.py"]

model = dict(model_name="vim_nano", in_chans=1, num_classes=10, img_size=16)
optimizer = dict(lr=3e-3)
schedule = dict(num_epochs=30)
