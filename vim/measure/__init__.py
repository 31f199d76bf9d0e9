"""Time, memory and compute of ops and models."""

from vim.measure.baselines import Baseline, compare_baselines
from vim.measure.compare import Row, plot, show
from vim.measure.flops import FORMULAS, Cost, Counts, cost_of, count
from vim.measure.models import PASSES, compare_imports, compare_models
from vim.measure.ops import compare_layouts, compare_routes, compare_scans, compare_ssd
from vim.measure.videos import compare_clips, compare_decoding

__all__ = [
    "FORMULAS",
    "PASSES",
    "Baseline",
    "Cost",
    "Counts",
    "Row",
    "compare_baselines",
    "compare_clips",
    "compare_decoding",
    "compare_imports",
    "compare_models",
    "compare_layouts",
    "compare_routes",
    "compare_scans",
    "compare_ssd",
    "cost_of",
    "count",
    "plot",
    "show",
]
