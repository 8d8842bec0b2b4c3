"""Design, inspect, train and ship neural networks without normalizers.

>>> import normfree
>>> model = normfree.create_model("nf_resnet50")
>>> normfree.spp(model).plot("spp.png")  # doctest: +SKIP
"""

from typing import Any

from normfree import interrupt, optim  # noqa: F401 - interrupt first: what follows takes seconds to import
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


def __getattr__(name: str) -> Any:
    """Return ``HubModel``, whose class needs huggingface_hub, when it is asked for."""
    if name == "HubModel":
        from normfree.weights.hub import hub_model_class

        try:
            return hub_model_class()
        except ImportError as error:  # hasattr has to be False, not to raise
            raise AttributeError(str(error)) from error
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
