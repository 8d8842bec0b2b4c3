"""Design, inspect, train and ship neural networks without normalizers.

>>> import normfree
>>> model = normfree.create_model("nf_resnet50")
>>> normfree.spp(model).plot("spp.png")  # doctest: +SKIP
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from normfree import terminal  # noqa: F401 - first: Ctrl-C is caught before anything imports torch

if TYPE_CHECKING:
    from normfree import data as data
    from normfree import export as export
    from normfree import models as models
    from normfree import nn as nn
    from normfree import optim
    from normfree import signal as signal
    from normfree import train as train
    from normfree import weights as weights
    from normfree.convert import convert
    from normfree.models import create_model, list_models
    from normfree.nn import fold, gamma
    from normfree.signal import SignalHistory, SignalMonitor, SignalPropagation, spp
    from normfree.weights import (
        from_pretrained,
        load,
        load_haiku_weights,
        load_timm_weights,
        push_to_hub,
        save,
        save_pretrained,
    )

__version__ = "0.1.0"

__all__ = [
    "SignalHistory",
    "SignalMonitor",
    "SignalPropagation",
    "convert",
    "create_model",
    "fold",
    "from_pretrained",
    "gamma",
    "list_models",
    "load",
    "load_haiku_weights",
    "load_timm_weights",
    "optim",
    "push_to_hub",
    "save",
    "save_pretrained",
    "spp",
]

_MODULES = ("convert", "data", "export", "models", "nn", "optim", "signal", "train", "weights")
"""Packages that are attributes; ``convert`` can be called, too, as its function."""

_HOMES = {
    "SignalHistory": "signal",
    "SignalMonitor": "signal",
    "SignalPropagation": "signal",
    "create_model": "models",
    "fold": "nn",
    "from_pretrained": "weights",
    "gamma": "nn",
    "list_models": "models",
    "load": "weights",
    "load_haiku_weights": "weights",
    "load_timm_weights": "weights",
    "push_to_hub": "weights",
    "save": "weights",
    "save_pretrained": "weights",
    "spp": "signal",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for, and only that: importing torch takes seconds that ``normfree --help`` need not."""
    if name in _MODULES:
        return import_module(f"normfree.{name}")
    if name in _HOMES:
        value = globals()[name] = getattr(import_module(f"normfree.{_HOMES[name]}"), name)
        return value
    if name == "HubModel":  # its class needs huggingface_hub
        from normfree.weights.hub import hub_model_class

        try:
            return hub_model_class()
        except ImportError as error:  # hasattr has to be False, not to raise
            raise AttributeError(str(error)) from error
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """All that can be asked for, imported yet or not."""
    return sorted({*globals(), *__all__, *_MODULES})
