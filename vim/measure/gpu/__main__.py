"""Run one stage, or a part of its cases, in this process: `python -m vim.measure.gpu STAGE --out DIR --end N`."""

import argparse
from pathlib import Path

from vim.measure.gpu import correct, models, ops, profile, train, tune
from vim.measure.gpu.stage import Stage

MODULES = {"correct": correct, "ops": ops, "models": models, "tune": tune, "train": train, "profile": profile}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=MODULES)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--end", type=float, required=True, help="a reading of time.monotonic")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--warm", action="store_true")
    parser.add_argument("--part", type=int, default=0)
    parser.add_argument("--parts", type=int, default=1)
    words = vars(parser.parse_args())
    name = words.pop("stage")
    MODULES[name].run(Stage(name, words.pop("out"), **words))


if __name__ == "__main__":
    main()
