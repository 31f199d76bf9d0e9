"""What the pictures of a run say."""

from types import SimpleNamespace

import pytest
import torch

from vim.engine import plots


@pytest.fixture
def drawn(monkeypatch):
    """The figures that would be saved."""
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: figures.append(figure))
    return figures


def test_curves_mark_the_epoch_of_the_best_weights(drawn, tmp_path):
    scores = [0.5, 0.75, 0.75, 0.25]
    rows = [{"epoch": i + 1, "train_loss": 2.0, "loss": 1 / (i + 1), "top1": top1} for i, top1 in enumerate(scores)]
    recipe = SimpleNamespace(model={"model_name": "vim_nano"})
    task = SimpleNamespace(score=lambda row: row["top1"])
    plots.plot_curves(SimpleNamespace(rows=rows, recipe=recipe, task=task, work_dir=tmp_path / "a_$run"))
    (figure,) = drawn
    assert figure.get_suptitle() == r"vim_nano, a_\$run"
    legends = [[text.get_text() for text in axes.get_legend().get_texts()] for axes in figure.axes]
    assert legends == [
        ["training, 2", "held out, 0.3333", "best epoch, 3"],
        ["held-out top-1 accuracy, 0.75", "best epoch, 3"],
    ]


@pytest.mark.parametrize(("count", "numbers", "names"), [(10, 11, 10), (31, 0, 31), (1000, 0, None)])
def test_a_confusion_matrix_of_many_classes_has_fewer_labels(count, numbers, names, drawn, tmp_path):
    confusion = 3 * torch.eye(count, dtype=torch.int64)
    confusion[0, 1] = 1
    plots.plot_confusion(tmp_path / "a.png", confusion, [f"class {i}" for i in range(count)], "run")
    (figure,) = drawn
    axes = figure.axes[0]
    total = 3 * count + 1
    assert axes.get_title() == f"run\ntop-1 accuracy {300 * count / total:.2f} % of {total:,} images"
    assert sorted(text.get_text() for text in axes.texts) == (["1"] + ["3"] * 10 if numbers else [])
    found = [text.get_text() for text in axes.get_yticklabels() if text.get_text().startswith("class")]
    assert len(found) == (names or 0)
