"""TSM2 on ETTh1, 336 hours ahead.

Paper: https://arxiv.org/abs/2403.19888 (the hyper-parameters, which it does not tell, are ours).
Command: python tools/forecast.py train configs/tsm2/tsm2_etth1_336.py --cfg-options data.file=PATH
MSE: 0.419 published, not measured here.
"""

_base_ = ["../_base_/tsm2.py"]

data = dict(split="etth", horizon=336)
