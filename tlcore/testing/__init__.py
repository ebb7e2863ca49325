"""For people who write sinks and stores: conformance suites to subclass, and stores that misbehave.

The suites are plain pytest classes, so pytest must be installed to use them.
"""

from .backend_suite import BackendConformance
from .run_writer import RunWriter
from .samples import every_dtype, make_record, make_run, make_summary
from .sink_suite import SinkConformance, Tensors
from .store_suite import StoreConformance
from .stores import FailingStore, MemoryStore, SlowStore

__all__ = [
    "BackendConformance",
    "FailingStore",
    "MemoryStore",
    "RunWriter",
    "SinkConformance",
    "SlowStore",
    "StoreConformance",
    "Tensors",
    "every_dtype",
    "make_record",
    "make_run",
    "make_summary",
]
