"""Forecast time series: train a model, evaluate it on the held-out end, forecast what comes after a table."""

import argparse
import shlex
from pathlib import Path

from vim.engine.config import OptionsAction, work_dir_of
from vim.engine.forecast import (
    Comparison,
    ForecastTrainer,
    check_out,
    compare,
    forecast_next,
    load_forecast_config,
    load_forecaster,
    plot_curves,
    series_for,
    windows_of,
    write_comparison,
    write_forecast,
)
from vim.errors import UserError, run


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train what a config describes, and evaluate it")
    train.add_argument("config", type=Path, help="a file below configs/tsm2")
    train.add_argument("--work-dir", type=Path, help="where results go (default: work_dirs/ and the config's name)")
    train.add_argument("--resume", action="store_true", help="go on from last.pth of the work dir where there is one")
    train.add_argument(
        "--cfg-options", nargs="+", action=OptionsAction, default={}, metavar="KEY=VALUE", help="change the config"
    )
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
    config = load_forecast_config(arguments.config, arguments.cfg_options)
    work_dir = work_dir_of(arguments)
    trainer = ForecastTrainer(config, work_dir, resume=arguments.resume)
    trainer.fit()
    plot_curves(work_dir / "curves.png", trainer.rows)
    comparison = compare(trainer.model, config.model.model_name, trainer.series, trainer.windows, config.data)
    names = write_comparison(comparison, trainer.series, trainer.scaler, work_dir)
    print(f"in {work_dir}: {', '.join(['best.pth', 'last.pth', 'log.csv', 'train.log', 'curves.png', *names])}")
    best = str(work_dir / "best.pth")
    print("next:")
    table = ["--file", "TABLE"] if config.data.get("known") else []  # one that ends with what is known beforehand
    for words in (["evaluate", best], ["predict", best, str(work_dir / "next.csv"), *table]):
        print(f"  {shlex.join(['python', 'tools/forecast.py', *words])}")
    print_scores(comparison)


def evaluate(arguments: argparse.Namespace) -> None:
    if arguments.file and not arguments.work_dir:
        raise UserError("--file also takes --work-dir: beside the checkpoint are the results on the run's own table")
    model, meta, scaler = load_forecaster(arguments.checkpoint)
    series = series_for(meta, arguments.file)
    windows, _ = windows_of(meta["data"], series, scaler)
    comparison = compare(model, meta["model"]["model_name"], series, windows, meta["data"])
    work_dir = arguments.work_dir or arguments.checkpoint.parent
    names = write_comparison(comparison, series, scaler, work_dir)
    print(f"in {work_dir}: {', '.join(names)}")
    print_scores(comparison)


def predict(arguments: argparse.Namespace) -> None:
    model, meta, scaler = load_forecaster(arguments.checkpoint)
    series = series_for(meta, arguments.file)
    check_out(arguments.out, arguments.checkpoint.parent, series, meta["data"])
    dates, values = forecast_next(model, series, scaler, meta["data"])
    paths = write_forecast(arguments.out, series, dates, values)
    print(f"{len(dates)} steps after {series.source}: {', '.join(map(str, paths))}")


def print_scores(comparison: Comparison) -> None:
    """Errors on scaled values; the model's last."""
    print(f"{len(comparison.windows)} windows of the test part, scaled values")
    for name, score in reversed(comparison.scores.items()):
        print(f"{name:>12}: MSE {score.mse:.4f}, MAE {score.mae:.4f}")


def main() -> None:
    arguments = parse()
    {"train": train, "evaluate": evaluate, "predict": predict}[arguments.command](arguments)


if __name__ == "__main__":
    run(main)
