"""AdamW, and a cosine of 300 epochs after 5 of linear warm-up, set anew at every epoch; a config gives lr.

A config's lr is for a global batch of 512 images, times the global batch / 512; warmup_lr and min_lr are not scaled.
The published code sets the rate after an epoch, to that of the epoch that is over: from the second on it is an epoch
behind what is done here.
"""

optimizer = dict(opt="adamw", weight_decay=0.05)
schedule = dict(sched="cosine", num_epochs=300, warmup_epochs=5, warmup_lr=1e-6, min_lr=1e-5, step_on_epochs=True)
