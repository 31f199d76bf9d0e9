"""AdamW, and a cosine after a linear warm-up, set anew at every step; a config gives the rates.

A config's rates are for 256 clips a step, times the clips a step / 256. Its layer decay is what it says. The published
code's, which in effect freezes the embeddings and leaves the blocks alone, is optimizer.published_decay=True.
"""

optimizer = dict(opt="adamw", weight_decay=0.05)
schedule = dict(sched="cosine", step_on_epochs=False)
