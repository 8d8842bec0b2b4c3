"""Images to measure with, to train on and to evaluate on, from folders, parquet, shards, the hub or the package."""

from normfree.data.augmentation import Augmentation, Standardization
from normfree.data.config import AugmentationConfig, DataConfig, OnBadImage
from normfree.data.holdout import with_any_split, with_holdout
from normfree.data.order import TooFewExamples
from normfree.data.pipeline import (
    EvaluationData,
    TrainingData,
    identify_training,
    open_evaluation,
    open_training,
)
from normfree.data.probe import GaussianNoise, ImageFolder, Photographs, Probe, probe_named
from normfree.data.records import list_names

__all__ = [
    "Augmentation",
    "AugmentationConfig",
    "DataConfig",
    "EvaluationData",
    "GaussianNoise",
    "ImageFolder",
    "OnBadImage",
    "Photographs",
    "Probe",
    "Standardization",
    "TooFewExamples",
    "TrainingData",
    "identify_training",
    "list_names",
    "open_evaluation",
    "open_training",
    "probe_named",
    "with_any_split",
    "with_holdout",
]
