"""Layers of networks without normalizers, and the constants they need."""

from normfree.nn.activations import ACTIVATIONS, Activation, Elementwise, build_activation
from normfree.nn.affine import BranchScale, ChannelAffine, ChannelUnits, Copy, OutputCopy
from normfree.nn.branch_end import BranchEnd
from normfree.nn.centring import centre_weights
from normfree.nn.fold import Foldable, fold, has_foldable
from normfree.nn.gamma import OFFICIAL_GAMMA, gamma
from normfree.nn.kept_mean import (
    KeptMean,
    KeptMeanConv1d,
    KeptMeanConv2d,
    KeptMeanConv3d,
    KeptMeanConvTranspose1d,
    KeptMeanConvTranspose2d,
    KeptMeanConvTranspose3d,
    KeptMeanLinear,
)
from normfree.nn.padding import (
    PADDING_STYLES,
    AveragePool2x2,
    MaxPool2d,
    PaddedConv2d,
    pad_same,
    same_padding,
    symmetric_padding,
)
from normfree.nn.scaled_conv import ScaledConv2d
from normfree.nn.scaled_ws_conv import ScaledWSConv2d
from normfree.nn.scaled_ws_layers import (
    ScaledWSConv1d,
    ScaledWSConv3d,
    ScaledWSConvTranspose1d,
    ScaledWSConvTranspose2d,
    ScaledWSConvTranspose3d,
    ScaledWSLinear,
)
from normfree.nn.squeeze_excite import SqueezeExcite
from normfree.nn.standardization import VARIANCE_FLOOR, standardize
from normfree.nn.standardized_module import (
    Standardization,
    WeightLayout,
    standardization_of,
    standardize_module,
)
from normfree.nn.stochastic_depth import StochasticDepth
from normfree.nn.variance_plan import PlannedBlock, variance_plan

__all__ = [
    "ACTIVATIONS",
    "OFFICIAL_GAMMA",
    "PADDING_STYLES",
    "VARIANCE_FLOOR",
    "Activation",
    "AveragePool2x2",
    "BranchEnd",
    "BranchScale",
    "ChannelAffine",
    "ChannelUnits",
    "Copy",
    "Elementwise",
    "Foldable",
    "KeptMean",
    "KeptMeanConv1d",
    "KeptMeanConv2d",
    "KeptMeanConv3d",
    "KeptMeanConvTranspose1d",
    "KeptMeanConvTranspose2d",
    "KeptMeanConvTranspose3d",
    "KeptMeanLinear",
    "MaxPool2d",
    "OutputCopy",
    "PaddedConv2d",
    "PlannedBlock",
    "ScaledConv2d",
    "ScaledWSConv1d",
    "ScaledWSConv2d",
    "ScaledWSConv3d",
    "ScaledWSConvTranspose1d",
    "ScaledWSConvTranspose2d",
    "ScaledWSConvTranspose3d",
    "ScaledWSLinear",
    "SqueezeExcite",
    "Standardization",
    "StochasticDepth",
    "WeightLayout",
    "build_activation",
    "centre_weights",
    "fold",
    "gamma",
    "has_foldable",
    "pad_same",
    "same_padding",
    "standardization_of",
    "standardize",
    "standardize_module",
    "symmetric_padding",
    "variance_plan",
]
