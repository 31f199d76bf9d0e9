"""TSM2 on long-horizon benchmarks: a lookback of 512 rows, MSE, AdamW, early stopping.

The paper's hyper-parameters were found by a search whose result it does not give. These are ours.
"""

_base_ = ["schedules/adamw_cosine.py"]

model = dict(model_name="tsm2", embed_dim=32, depth=2, drop_rate=0.2)
data = dict(
    dataset="csv",
    file="",
    split="ratio",
    lookback=512,
    horizon=96,
    max_gap=6,
    calendar=False,
    season=None,
    batch_size=32,
)
optimizer = dict(opt="adamw", lr=1e-3, weight_decay=0.01)
schedule = dict(num_epochs=20, warmup_epochs=1)
train = dict(seed=0, clip_grad=1.0, patience=5)
