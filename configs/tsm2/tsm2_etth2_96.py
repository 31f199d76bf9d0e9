"""TSM2 on ETTh2, 96 hours ahead.

Paper: https://arxiv.org/abs/2403.19888 (the hyper-parameters, which it does not tell, are ours).
Command: python tools/forecast.py train configs/tsm2/tsm2_etth2_96.py --cfg-options data.file=PATH
MSE: 0.253 published, not measured here.
"""

_base_ = ["../_base_/tsm2.py"]

data = dict(split="etth", horizon=96)
