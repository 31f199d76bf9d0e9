"""The smallest VSSD on the handwritten digits of scikit-learn.

Paper: https://arxiv.org/abs/2407.18559 (the architecture; this size and recipe are ours).
Command: python tools/train.py configs/vssd/vssd-test_1xb64_digits.py
Hardware: two CPU cores.
Accuracy: 99.4 and 98.9 % of the 360 held-out digits (seeds 0 and 1), in 101 seconds of one core's time.
"""

_base_ = ["../_base_/datasets/digits.py", "../_base_/schedules/adamw_cosine.py", "../_base_/runtime.py"]

model = dict(model_name="test_vssd", in_chans=1, num_classes=10, img_size=32)
optimizer = dict(lr=3e-3)
schedule = dict(num_epochs=20)
