"""A signal monitor in other loops: thin adapters for Lightning Fabric and the Lightning Trainer."""

from __future__ import annotations

from typing import Any

from normfree.common.packages import required
from normfree.signal.monitor import SignalMonitor


class SignalCallback:
    """Steps a monitor from a loop that calls hooks, as with Fabric's ``fabric.call("on_train_batch_end")``.

    Args:
        monitor: the monitor; build it on the model itself.
    """

    def __init__(self, monitor: SignalMonitor) -> None:
        self.monitor = monitor

    def on_train_start(self, *_: Any, **__: Any) -> None:
        self.monitor.start()

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        self.monitor.step()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.monitor.stop()

    def state_dict(self) -> dict[str, Any]:
        return self.monitor.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.monitor.load_state_dict(state_dict)


def lightning_callback(monitor: SignalMonitor) -> Any:
    """Return a ``lightning.pytorch.Callback`` that steps a monitor once per optimizer step.

    Args:
        monitor: the monitor; build it on the network, or on the LightningModule if its ``forward`` takes the batch.

    Raises:
        ImportError: if lightning is not installed.
    """
    Callback = required("lightning.pytorch", "lightning_callback").Callback

    class LightningSignalCallback(SignalCallback, Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any, **__: Any) -> None:
            # Batches that only accumulate leave the count of optimizer steps as it is.
            if trainer.global_step != self.monitor.steps:
                self.monitor.step(trainer.global_step)

    return LightningSignalCallback(monitor)
