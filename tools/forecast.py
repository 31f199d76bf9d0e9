"""Forecast time series: train a model, evaluate it on the held-out end, forecast what comes after a table.

Examples:
    vim-zoo forecast train tsm2/tsm2_vic-elec_24.py
    vim-zoo forecast predict work_dirs/tsm2_vic-elec_24/best.pth next.csv
"""

import argparse
from pathlib import Path

from vim.command_line import Parser, sibling
from vim.engine.config import add_run_arguments, recipe_of, work_dir_of
from vim.engine.files import results_in
from vim.engine.launch import holding
from vim.engine.plots import plot_curves
from vim.engine.weights import choose_save, load_weights, read_run
from vim.errors import UserError, run
from vim.options import SeriesRecipe
from vim.tasks.build import build_run
from vim.tasks.forecasting.baselines import Comparison, compare
from vim.tasks.forecasting.build import load_forecaster, windows_of
from vim.tasks.forecasting.predict import check_out, forecast_next, write_forecast
from vim.tasks.forecasting.report import write_comparison
from vim.tasks.forecasting.train import Forecasting


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train what a config describes, and evaluate it")
    add_run_arguments(train, SeriesRecipe)
    evaluate = commands.add_parser("evaluate", help="errors on the test part, and those of simple forecasts")
    evaluate.add_argument("checkpoint", type=Path, help="best.pth or last.pth of a run")
    evaluate.add_argument("--file", type=Path, help="another table with the same columns; takes --work-dir")
    evaluate.add_argument("--work-dir", type=Path, help="where results go (default: where the checkpoint is)")
    predict = commands.add_parser("predict", help="forecast the steps after the last row of a table")
    predict.add_argument("checkpoint", type=Path, help="best.pth or last.pth of a run")
    predict.add_argument("out", type=Path, help="the CSV file to write; a picture goes beside it")
    predict.add_argument("--file", type=Path, help="the table to go on with (default: the run's)")
    return parser.parse_args()


def train(arguments: argparse.Namespace) -> None:
    recipe, work_dir = recipe_of(arguments, SeriesRecipe), work_dir_of(arguments)
    with holding(work_dir):
        train_in(work_dir, arguments, recipe)


def train_in(work_dir: Path, arguments: argparse.Namespace, recipe: SeriesRecipe) -> None:
    loop = build_run(recipe, work_dir, choose_save(arguments.resume, work_dir))
    finished, task = loop.fit(), loop.task
    assert isinstance(task, Forecasting)
    if not loop.accelerator.is_main_process:
        return
    if not finished:
        loop.stop.leave(work_dir)
    load_weights(task.model, read_run(best := work_dir / "best.pth")["model"], best)
    plot_curves(work_dir / "curves.png", loop.rows)
    comparison = compare(task.model.eval(), recipe.model["model_name"], task.series, task.windows, recipe.data)
    names = write_comparison(comparison, task.series, task.scaler, work_dir)
    print(results_in(work_dir, "best.pth", "last.pth", "log.csv", "train.log", "curves.png", *names))
    print("next:")
    table = ["--file", "TABLE"] if recipe.data.known else []  # one that ends with the rows known beforehand
    for words in (["evaluate", str(best)], ["predict", str(best), str(work_dir / "next.csv"), *table]):
        print(f"  {sibling('forecast', *words)}")
    print_scores(comparison)


def evaluate(arguments: argparse.Namespace) -> None:
    if arguments.file and not arguments.work_dir:
        raise UserError("--file also takes --work-dir: beside the checkpoint are the results on the run's own table")
    forecaster = load_forecaster(arguments.checkpoint)
    series = forecaster.series(arguments.file)
    windows, _ = windows_of(forecaster.data, series, forecaster.scaler)
    comparison = compare(forecaster.model, forecaster.name, series, windows, forecaster.data)
    work_dir = arguments.work_dir or arguments.checkpoint.parent
    names = write_comparison(comparison, series, forecaster.scaler, work_dir)
    print(f"in {work_dir}: {', '.join(names)}")
    print_scores(comparison)


def predict(arguments: argparse.Namespace) -> None:
    forecaster = load_forecaster(arguments.checkpoint)
    series = forecaster.series(arguments.file)
    check_out(arguments.out, arguments.checkpoint.parent, series, forecaster)
    dates, values = forecast_next(forecaster, series)
    paths = write_forecast(arguments.out, series, dates, values)
    print(f"{len(dates)} steps after {series.source}: {', '.join(map(str, paths))}")


def print_scores(comparison: Comparison) -> None:
    """Print the errors on scaled values, the model's last."""
    print(f"{len(comparison.windows)} windows of the test part, scaled values")
    for name, score in reversed(comparison.scores.items()):
        print(f"{name:>12}: MSE {score.mse:.4f}, MAE {score.mae:.4f}")


def main() -> None:
    arguments = parse()
    {"train": train, "evaluate": evaluate, "predict": predict}[arguments.command](arguments)


if __name__ == "__main__":
    run(main)
