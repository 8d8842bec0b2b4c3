"""Training: recipes, the loop, checkpoints."""

from normfree.train.checkpoint import Checkpoint, CheckpointStore
from normfree.train.config import Accelerator, Log, OptimizerConfig, Precision, Strategy, TrainConfig
from normfree.train.config_file import read_config
from normfree.train.recipes import RECIPES
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
