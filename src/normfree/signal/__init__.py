"""Signal propagation plots of any model, from its recorded dataflow."""

from normfree.common.files import write_atomically
from normfree.signal.findings import KINDS
from normfree.signal.measure import spp
from normfree.signal.monitor import SignalCallback, SignalHistory, SignalMonitor, lightning_callback
from normfree.signal.propagation import BlockSignal, Entry, Finding, SignalPropagation, write_json
from normfree.trace.inputs import input_shape

__all__ = [
    "KINDS",
    "BlockSignal",
    "Entry",
    "Finding",
    "SignalCallback",
    "SignalHistory",
    "SignalMonitor",
    "SignalPropagation",
    "input_shape",
    "lightning_callback",
    "spp",
    "write_atomically",
    "write_json",
]
