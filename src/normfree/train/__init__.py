"""Training: recipes, the loop, checkpoints."""

from normfree.train.checkpoint import Checkpoint, CheckpointStore
from normfree.train.config import OptimizerConfig, TrainConfig
from normfree.train.recipes import RECIPES
from normfree.train.trainer import NonFiniteLossError, Summary, train

__all__ = [
    "RECIPES",
    "Checkpoint",
    "CheckpointStore",
    "NonFiniteLossError",
    "OptimizerConfig",
    "Summary",
    "TrainConfig",
    "train",
]
