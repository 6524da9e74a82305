"""Evaluation: intervals of scores, a Fréchet distance that needs no download, and the report of a run."""

from crd_fast.evaluation.frechet import RandomFeatures, frechet_distance, gaussian_frechet
from crd_fast.evaluation.intervals import Interval, clustered_bootstrap, macro_interval
from crd_fast.evaluation.report import write_report

__all__ = [
    "Interval",
    "RandomFeatures",
    "clustered_bootstrap",
    "frechet_distance",
    "gaussian_frechet",
    "macro_interval",
    "write_report",
]
