"""AdamW; 5 epochs of linear warm-up in a cosine of 300. The rate changes at every epoch.

A config sets lr: its rate for 512 images per update, times the images per update / 512. warmup_lr and min_lr are not
scaled. The published code sets an epoch's rate only after the epoch, so its rates are one epoch behind these from the
second epoch on.
"""

optimizer = dict(opt="adamw", weight_decay=0.05)
schedule = dict(sched="cosine", num_epochs=300, warmup_epochs=5, warmup_lr=1e-6, min_lr=1e-5, step_on_epochs=True)
