"""TSM2 on Traffic, 720 hours ahead.

Paper: https://arxiv.org/abs/2403.19888 (the hyper-parameters, which it does not tell, are ours).
Command: python tools/forecast.py train configs/tsm2/tsm2_traffic_720.py --cfg-options data.file=PATH
MSE: 0.449 published, not measured here.
"""

_base_ = ["../_base_/tsm2.py"]

model = dict(expand=1)
data = dict(horizon=720, batch_size=4)
