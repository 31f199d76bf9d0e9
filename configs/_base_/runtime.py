"""Options of `train` for most runs."""

train = dict(seed=0, amp="no", clip_grad=1.0, smoothing=0.1)
