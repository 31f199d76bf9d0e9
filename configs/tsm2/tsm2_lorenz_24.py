"""TSM2 on Lorenz's chaotic system of three variates, simulated: 24 steps of 0.05.

Paper: https://arxiv.org/abs/2403.19888 (the architecture; the data, this size and recipe are ours).
Command: python tools/forecast.py train configs/tsm2/tsm2_lorenz_24.py
Hardware: one CPU core, three and a half minutes.
MSE: 0.058 (seed 0), the linear map 0.872, the last value 1.749.
"""

_base_ = ["../_base_/tsm2.py"]

model = dict(patch_size=8, patch_stride=4, drop_rate=0.0)
data = dict(dataset="lorenz", lookback=64, horizon=24, batch_size=64)
optimizer = dict(lr=2e-3)
schedule = dict(num_epochs=15)
