"""Training: recipes, the loop, checkpoints."""

from normfree.train.checkpoint import Checkpoint, CheckpointStore
from normfree.train.config import (
    RECIPES,
    Accelerator,
    Log,
    OptimizerConfig,
    Precision,
    Strategy,
    TrainConfig,
    read_config,
)
from normfree.train.trainer import NonFiniteLossError, Summary, train

__all__ = [
    "RECIPES",
    "Accelerator",
    "Checkpoint",
    "CheckpointStore",
    "Log",
    "NonFiniteLossError",
    "OptimizerConfig",
    "Precision",
    "Strategy",
    "Summary",
    "TrainConfig",
    "read_config",
    "train",
]
