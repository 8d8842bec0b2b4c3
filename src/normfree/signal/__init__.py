"""Signal propagation plots of any model, from its recorded dataflow."""

from normfree.common.files import write_atomically
from normfree.signal.measure import Points, spp
from normfree.signal.monitor import (
    SignalCallback,
    SignalHistory,
    SignalMonitor,
    lightning_callback,
    transformers_callback,
)
from normfree.signal.propagation import (
    KINDS,
    BlockSignal,
    Curve,
    Entry,
    Finding,
    Kind,
    Severity,
    SignalPropagation,
    write_json,
)
from normfree.trace.inputs import input_shape
from normfree.trace.preserve import Mode

__all__ = [
    "KINDS",
    "BlockSignal",
    "Curve",
    "Entry",
    "Finding",
    "Kind",
    "Mode",
    "Points",
    "Severity",
    "SignalCallback",
    "SignalHistory",
    "SignalMonitor",
    "SignalPropagation",
    "input_shape",
    "lightning_callback",
    "spp",
    "transformers_callback",
    "write_atomically",
    "write_json",
]
