"""Optimization without normalizers: adaptive gradient clipping, parameter groups, schedule, weight averaging."""

from normfree.optim.averaging import WeightAverage
from normfree.optim.centring import InputCentring
from normfree.optim.clipping import clip_grad_adaptive_
from normfree.optim.clipping_optimizer import AdaptiveGradientClipping
from normfree.optim.final_layers import final_layers
from normfree.optim.groups import nesterov_sgd, parameter_groups
from normfree.optim.muon import Muon, muon_groups, muon_sgd
from normfree.optim.schedule import warmup_cosine, warmup_cosine_factor

__all__ = [
    "AdaptiveGradientClipping",
    "InputCentring",
    "Muon",
    "WeightAverage",
    "clip_grad_adaptive_",
    "final_layers",
    "muon_groups",
    "muon_sgd",
    "nesterov_sgd",
    "parameter_groups",
    "warmup_cosine",
    "warmup_cosine_factor",
]
