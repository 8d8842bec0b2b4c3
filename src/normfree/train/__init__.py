"""Training: recipes, the loop, checkpoints."""

from normfree.train.checkpoint import Checkpoint, CheckpointStore
from normfree.train.config import Accelerator, OptimizerConfig, Precision, Strategy, TrainConfig
from normfree.train.recipes import RECIPES
from normfree.train.trainer import NonFiniteLossError, Summary, train

__all__ = [
    "RECIPES",
    "Accelerator",
    "Checkpoint",
    "CheckpointStore",
    "NonFiniteLossError",
    "OptimizerConfig",
    "Precision",
    "Strategy",
    "Summary",
    "TrainConfig",
    "train",
]
