"""Optimization without normalizers: adaptive gradient clipping, parameter groups, schedule, weight averaging."""

from normfree.nn.centring import InputCentring
from normfree.optim.averaging import WeightAverage
from normfree.optim.clipping import AdaptiveGradientClipping, clip_grad_adaptive_
from normfree.optim.groups import final_layers, nesterov_sgd, parameter_groups, warmup_cosine, warmup_cosine_factor
from normfree.optim.muon import Muon, Rule, muon_groups, muon_sgd

__all__ = [
    "AdaptiveGradientClipping",
    "InputCentring",
    "Muon",
    "Rule",
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
