"""TSM2 on the electricity demand of Victoria that comes with statsmodels: the next day, by the hour.

Paper: https://arxiv.org/abs/2403.19888 (the architecture; this size and recipe are ours).
Command: python tools/forecast.py train configs/tsm2/tsm2_vic-elec_24.py
Hardware: one CPU core, 16 seconds.
MSE: 0.073 to 0.076 (seeds 0 to 2), the linear map 0.086, the week before 0.115.
"""

_base_ = ["../_base_/tsm2.py"]

# one variate and only a few months of data: a linear map of two weeks, and beside it mixers on the last two days
model = dict(variate_mixer="none", embed_dim=16, depth=1, linear_skip=True, mixer_len=48)
data = dict(dataset="vic_elec", lookback=336, horizon=24, calendar=True)
schedule = dict(num_epochs=4)  # with more it overfits
