"""Design, inspect, train and ship neural networks without normalizers.

>>> import normfree
>>> model = normfree.create_model("nf_resnet50")
>>> normfree.spp(model).plot("spp.png")  # doctest: +SKIP
"""

from normfree.convert import convert, load, save
from normfree.models import create_model, list_models
from normfree.nn import fold, gamma
from normfree.signal import SignalPropagation, spp
from normfree.weights import load_haiku_weights, load_timm_weights

__version__ = "0.1.0"

__all__ = [
    "SignalPropagation",
    "convert",
    "create_model",
    "fold",
    "gamma",
    "list_models",
    "load",
    "load_haiku_weights",
    "load_timm_weights",
    "save",
    "spp",
]
