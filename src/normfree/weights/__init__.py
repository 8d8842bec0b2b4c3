"""Weights in and out, safely."""

from normfree.weights.checkpoint import load, save
from normfree.weights.haiku import load_haiku_weights
from normfree.weights.timm import load_timm_weights

__all__ = ["load", "load_haiku_weights", "load_timm_weights", "save"]
