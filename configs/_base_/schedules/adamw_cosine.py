"""AdamW; linear warm-up, then a cosine. The rate changes at every update."""

optimizer = dict(opt="adamw", lr=1e-3, weight_decay=0.05)
schedule = dict(sched="cosine", num_epochs=50, warmup_epochs=5, warmup_lr=1e-6, min_lr=1e-5, step_on_epochs=False)
