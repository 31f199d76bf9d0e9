"""AdamW; linear warm-up, then a cosine. The rate changes at every update.

A config sets the rates: those for 256 clips per update, times the clips per update / 256. Its layer decay applies to
all layers. The published code in effect freezes the embeddings and does not decay the blocks' rates: for that set
optimizer.published_decay=True.
"""

optimizer = dict(opt="adamw", weight_decay=0.05)
schedule = dict(sched="cosine", step_on_epochs=False)
