"""Options of `train` for VideoMamba: bfloat16, no clipping, no running average of the weights."""

train = dict(seed=0, amp="bf16", smoothing=0.1)
