"""Weights in and out, safely."""

from normfree.weights.checkpoint import load, save
from normfree.weights.haiku import load_haiku_weights
from normfree.weights.hub import from_pretrained, push_to_hub, save_pretrained
from normfree.weights.timm import load_timm_weights

__all__ = [
    "from_pretrained",
    "load",
    "load_haiku_weights",
    "load_timm_weights",
    "push_to_hub",
    "save",
    "save_pretrained",
]
