"""TSM2 on the eight benchmarks of long-horizon forecasting, 96, 192, 336 and 720 rows ahead.

Paper: https://arxiv.org/abs/2403.19888 (it does not name its hyper-parameters; these are ours)
Command: python tools/forecast.py train configs/tsm2/benchmarks.py:tsm2_etth1_96 --cfg-options data.file=PATH
Hardware: one GPU or CPU.
MSE: published, not measured here:

                        96    192    336    720
    etth1            0.375  0.398  0.419  0.422
    etth2            0.253  0.334  0.347  0.401
    ettm1            0.322  0.349  0.366  0.407
    ettm2            0.173  0.230  0.279  0.388
    electricity      0.142  0.153  0.175  0.209
    exchange         0.163  0.229  0.383  0.999
    traffic          0.396  0.408  0.427  0.449
    weather          0.161  0.208  0.252  0.337
"""

_base_ = ["../_base_/tsm2.py"]

_benchmarks = {
    "etth1": dict(data=dict(split="etth")),
    "etth2": dict(data=dict(split="etth")),
    "ettm1": dict(data=dict(split="ettm")),
    "ettm2": dict(data=dict(split="ettm")),
    "electricity": dict(data=dict(batch_size=16)),  # 321 variates
    "exchange": dict(data=dict()),
    "traffic": dict(data=dict(batch_size=4), model=dict(expand=1)),  # 862 variates
    "weather": dict(data=dict()),
}
rows = {
    f"tsm2_{name}_{horizon}": {**changes, "data": {**changes["data"], "horizon": horizon}}
    for name, changes in _benchmarks.items()
    for horizon in (96, 192, 336, 720)
}
