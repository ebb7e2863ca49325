"""Comparing two runs: which tensors differ, by how much, and where in the execution it begins."""

from __future__ import annotations

from .compare import compare
from .details import Details
from .measure import Measures, Tolerance
from .results import Comparison, Divergence, TensorResult
from .stats import Sighting, Survey, TensorStatistics, stats

__all__ = [
    "Comparison",
    "Details",
    "Divergence",
    "Measures",
    "Sighting",
    "Survey",
    "TensorResult",
    "TensorStatistics",
    "Tolerance",
    "compare",
    "stats",
]
