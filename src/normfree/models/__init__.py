"""Networks by name: the paper's normalizer-free families and those it compares them with."""

from normfree.models.nfnet import NFNet
from normfree.models.pyramid import FeaturePyramidBackbone, PyramidLevel
from normfree.models.registry import (
    ConvolutionName,
    Norm,
    Order,
    Overrides,
    Stem,
    accepted_overrides,
    create_model,
    list_models,
)
from normfree.models.regnets import BNRegNet, NFRegNet
from normfree.models.resnets import FixUpResNet, NFResNet, ResNet, ResNetV2, SkipInitResNet
from normfree.models.scaffold import Backbone, FeatureInfo

__all__ = [
    "BNRegNet",
    "Backbone",
    "ConvolutionName",
    "FeatureInfo",
    "FeaturePyramidBackbone",
    "FixUpResNet",
    "NFNet",
    "NFRegNet",
    "NFResNet",
    "Norm",
    "Order",
    "Overrides",
    "PyramidLevel",
    "ResNet",
    "ResNetV2",
    "SkipInitResNet",
    "Stem",
    "accepted_overrides",
    "create_model",
    "list_models",
]
