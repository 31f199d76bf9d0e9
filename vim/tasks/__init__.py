"""What a run does. Each task trains on :class:`vim.engine.loop.Loop`; `build.build_run` chooses it by the recipe.

- `classification`: images and clips with labels: training, evaluation, predictions.
- `pretraining`: clips without labels, by a frozen image model.
- `forecasting`: time series.
"""
