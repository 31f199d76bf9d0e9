"""What every run needs, whatever its task. Import from the modules; this package imports none of them.

- `loop`: :class:`~vim.engine.loop.Loop` trains a :class:`~vim.engine.loop.Task`: epochs, updates, saves, logs.
- `config`: a config file and the command line as a recipe.
- `build`: the sections of a recipe as model, loader, optimizer and schedule.
- `weights`: checkpoints: save, find, read.
- `students`: modules that are trained together with a model and then left out.
- `launch`: one process or many. `guards`: what can go wrong. `files`: files that are whole or not there.
- `log`, `trackers`, `plots`: what a run shows and keeps.
"""
