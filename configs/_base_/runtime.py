"""What a run is started with, whatever it trains."""

train = dict(seed=0, amp="no", clip_grad=1.0, smoothing=0.1)
