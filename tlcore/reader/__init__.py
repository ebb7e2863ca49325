"""Reading a run back: `open_run` gives steps, calls, tensors and structures, each loaded when asked for."""

from __future__ import annotations

from ..errors import MissingError
from .call import Call
from .operator import Operator
from .rebuild import Arguments, OpaqueObject, Skipped
from .request import Gap, Request
from .run import Run
from .runs import RunSummary, is_run, list_runs, open_run
from .step import Step
from .tensor_stream import TensorStream

__all__ = [
    "Arguments",
    "Call",
    "Gap",
    "MissingError",
    "OpaqueObject",
    "Operator",
    "Request",
    "Run",
    "RunSummary",
    "Skipped",
    "Step",
    "TensorStream",
    "is_run",
    "list_runs",
    "open_run",
]
