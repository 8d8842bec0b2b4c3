"""Listen to any model: signal propagation plots from the recorded dataflow. Knows torch alone."""

from normfree.signal.files import write_atomically
from normfree.signal.findings import KINDS
from normfree.signal.history import SignalHistory
from normfree.signal.inputs import input_shape
from normfree.signal.measure import spp
from normfree.signal.monitor import SignalMonitor
from normfree.signal.propagation import BlockSignal, Entry, Finding, SignalPropagation, write_json

__all__ = [
    "KINDS",
    "BlockSignal",
    "Entry",
    "Finding",
    "SignalHistory",
    "SignalMonitor",
    "SignalPropagation",
    "input_shape",
    "spp",
    "write_atomically",
    "write_json",
]
