"""Options of `train` for Vim on ImageNet-1k: float32, no clipping, and a running average of the weights.

The running average is what is evaluated. The authors' published accuracies are of the weights themselves: set
train.ema_decay=None to evaluate those.
"""

train = dict(seed=0, amp="no", smoothing=0.1, ema_decay=0.99996)
