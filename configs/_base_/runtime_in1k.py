"""What a run on ImageNet-1k is started with: float32, no clipping, and a running average of the weights.

The accuracy of a run is the average's. What the authors publish is the raw weights', for which train.ema_decay=None.
"""

train = dict(seed=0, amp="no", smoothing=0.1, ema_decay=0.99996)
