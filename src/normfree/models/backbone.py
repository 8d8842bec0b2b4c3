"""What every network here has: a stem, stages of blocks, a final layer, and a classifier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from normfree.common.checks import check_integer, check_rate


@dataclass(frozen=True)
class FeatureInfo:
    """One map of ``Backbone.forward_stages``.

    Attributes:
        name: the module that makes it.
        channels: its channels.
        stride: pixels of the input per cell, along each axis.
    """

    name: str
    channels: int
    stride: int


class Backbone(nn.Module):
    """A network of residual stages; blocks live at ``stages.<stage>.<block>``.

    ``logits = classifier(dropout(feature_scale * mean_HW(final(stages(stem(x))))))``

    Args:
        stem: from the input to the first block's input.
        stages: one sequence of blocks per stage.
        final: from the last stage's map to the final features (an activation, with what belongs to it).
        feature_info: one entry per stage.
        num_features: channels of the final features.
        num_classes: outputs of the classifier; 0 for none.
        drop_rate: dropout of the pooled features, in [0, 1).
        feature_scale: factor of the pooled features: the final activation's gamma in normalizer-free
            networks, put here because a pooled vector is far smaller than a map or the classifier's weight.
        classifier_std: standard deviation of the classifier's initial weight; its bias starts at 0.

    Attributes:
        name: the name ``create_model`` built it by; empty if built otherwise.
        config: arguments with which ``create_model`` builds another like it.
        post_activation: whether the blocks end in their activation, instead of beginning with it.
        standardized: whether the convolutions have scaled weight standardization.

    Raises:
        ValueError: negative num_classes; a drop_rate outside [0, 1).
    """

    post_activation: ClassVar[bool] = False
    standardized: ClassVar[bool] = False

    def __init__(
        self,
        *,
        stem: nn.Module,
        stages: Sequence[nn.Sequential],
        final: nn.Module,
        feature_info: Sequence[FeatureInfo],
        num_features: int,
        num_classes: int,
        drop_rate: float,
        classifier_std: float,
        feature_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.name = ""
        self.config: dict[str, Any] = {}
        self.feature_info = tuple(feature_info)
        self.num_features = num_features
        self.feature_scale = feature_scale
        self.num_classes = check_integer("num_classes", num_classes, 0)
        self.stem = stem
        self.stages = nn.ModuleList(stages)
        self.final = final
        self.dropout = nn.Dropout(check_rate("drop_rate", drop_rate))
        self.classifier: nn.Module = nn.Identity()
        if num_classes > 0:
            self.classifier = nn.Linear(num_features, num_classes)
            nn.init.normal_(self.classifier.weight, std=classifier_std)
            nn.init.zeros_(self.classifier.bias)

    def forward_stages(self, x: Tensor) -> list[Tensor]:
        """Return the map each stage ends with, [N, channels, H / stride, W / stride] of ``feature_info``."""
        x = self.stem(x)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the final map [N, num_features, H', W'], after the final normalizer and activation."""
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.final(x)

    def forward_pooled(self, x: Tensor) -> Tensor:
        """Return the pooled features [N, num_features] of x [N, in_channels, H, W], scaled."""
        pooled = self.forward_features(x).mean((2, 3))
        return pooled if self.feature_scale == 1 else pooled * self.feature_scale

    def forward_head(self, pooled: Tensor) -> Tensor:
        """Return the logits [N, num_classes] of pooled features [N, num_features]."""
        return self.classifier(self.dropout(pooled))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [N, num_classes] of x [N, in_channels, H, W]; without a classifier, the features."""
        pooled = self.forward_pooled(x)
        return self.forward_head(pooled) if self.num_classes > 0 else pooled
