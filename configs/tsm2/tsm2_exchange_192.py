"""TSM2 on Exchange, 192 days ahead.

Paper: https://arxiv.org/abs/2403.19888 (the hyper-parameters, which it does not tell, are ours).
Command: python tools/forecast.py train configs/tsm2/tsm2_exchange_192.py --cfg-options data.file=PATH
MSE: 0.229 published, not measured here.
"""

_base_ = ["../_base_/tsm2.py"]

data = dict(horizon=192)
