"""Images to measure with, to train on and to evaluate on, from folders, parquet, shards, the hub or the package."""

from normfree.data.augmentation import Augmentation, Standardization
from normfree.data.config import AugmentationConfig, DataConfig, OnBadImage
from normfree.data.pipeline import EvaluationData, TrainingData, open_evaluation, open_training
from normfree.data.probe import GaussianNoise, ImageFolder, Photographs, Probe, probe_named

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
    "TrainingData",
    "open_evaluation",
    "open_training",
    "probe_named",
]
