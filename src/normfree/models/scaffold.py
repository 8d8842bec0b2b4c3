"""What every network here has: a stem, four stages of residual blocks, a final layer and a classifier.

The families' own files hold their blocks, their stems and the tables of their variants. This one has where the blocks
stand (``stage_channels``, ``block_places``), the network around them (``Backbone``), and what is added for
normalizer-free ones: the variance plan that their blocks are built to (``NFStyle``, ``NFBackbone``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from normfree.common.checks import check_choice, check_integer, check_integers, check_number, check_rate, invalid
from normfree.nn import Activation, PaddingStyle, ScaledConv2d, ScaledWSConv2d, build_activation, variance_plan

STAGES = 4
# A quarter of it are 2 channels, the fewest a standardised 1x1 convolution can take: one would be all mean.
MINIMUM_WIDTH = 8


def stage_channels(
    depths: Sequence[int],
    base_widths: Sequence[int],
    width: float,
    widths: Sequence[int] | None,
    in_channels: int,
    padding: PaddingStyle,
    stochdepth_rate: float,
) -> tuple[int, ...]:
    """Check the arguments that all families share, and return the channels of the four stages.

    Args:
        depths: blocks per stage, four positive integers.
        base_widths: channels of the stages before the width multiplier, four, each at least 8.
        width: the width multiplier.
        widths: channels of the stages themselves, each at least 8, instead of ``width``; None to use it.
        in_channels: channels of the input.
        padding: "symmetric" or "same".
        stochdepth_rate: as :func:`block_places`'s.

    Raises:
        ValueError: a value that breaks its rule.
    """
    check_integers("depths", depths, STAGES)
    check_integers("base_widths", base_widths, STAGES, minimum=MINIMUM_WIDTH)
    check_number("width", width, 0.0, exclusive=True)
    if widths is not None:
        check_integers("widths", widths, STAGES, minimum=MINIMUM_WIDTH)
    channels = tuple(widths or (int(width * base) for base in base_widths))
    if min(channels) < MINIMUM_WIDTH:
        rule = f"leaves a stage fewer than {MINIMUM_WIDTH} channels"
        least = math.ceil(1000 * MINIMUM_WIDTH / min(base_widths)) / 1000
        raise invalid("width", width, rule, f"pass width={least} or more")
    check_integer("in_channels", in_channels, 1)
    check_choice("padding", padding, PaddingStyle)
    check_rate("stochdepth_rate", stochdepth_rate)
    return channels


@dataclass(frozen=True)
class BlockPlace:
    """Where a block stands, and its geometry.

    Attributes:
        stage: its stage, from 0.
        index: its number over the whole network, from 0.
        in_channels, out_channels: of the block.
        branch_channels: inside the branch.
        groups: of its 3x3 convolution.
        stride: of its 3x3 convolution and its shortcut.
        drop_rate: its probability of being skipped in training.
    """

    stage: int
    index: int
    in_channels: int
    out_channels: int
    branch_channels: int
    groups: int
    stride: int
    drop_rate: float

    @property
    def projects(self) -> bool:
        """Whether the shortcut has to be a convolution because the shape changes."""
        return self.stride > 1 or self.in_channels != self.out_channels


Branch = Callable[[int, int, int, int], tuple[int, int]]
"""Returns the channels and groups of a branch for its block's stage, index, in_channels and out_channels."""


def block_places(
    branch: Branch,
    depths: Sequence[int],
    channels: Sequence[int],
    stem_channels: int,
    stage_strides: Sequence[int],
    stochdepth_rate: float,
) -> list[list[BlockPlace]]:
    """Return the places of all blocks, stage by stage.

    Args:
        branch: says what a block's branch has inside.
        depths: blocks per stage.
        channels: of the stages.
        stem_channels: of the first block's input.
        stage_strides: of the first block of each stage.
        stochdepth_rate: block i of L is skipped in training with probability ``stochdepth_rate * i / L``.
    """
    places: list[list[BlockPlace]] = []
    in_channels, index = stem_channels, 0
    for stage, (depth, out_channels) in enumerate(zip(depths, channels, strict=True)):
        places.append([])
        for position in range(depth):
            stride = stage_strides[stage] if position == 0 else 1
            shape = (in_channels, out_channels, *branch(stage, index, in_channels, out_channels), stride)
            places[-1].append(BlockPlace(stage, index, *shape, stochdepth_rate * index / sum(depths)))
            in_channels, index = out_channels, index + 1
    return places


def grouped_branch(
    branch_width: Callable[[int, int, int, float], float],
    group_size: int | Sequence[int],
    expansion: float | Sequence[float],
) -> Branch:
    """Return what says the channels and groups of branches with a grouped convolution: whole groups, at least one.

    Args:
        branch_width: returns the channels a branch asks for, given its block's index, in_channels, out_channels and
            the stage's expansion. They are rounded down to whole groups; fewer than a group are one narrower group.
        group_size: channels of a group, one value or one per stage.
        expansion: factor of the branches' width, one value or one per stage.

    Raises:
        ValueError: a value that breaks its rule, now or where it leaves a branch a single channel.
    """
    sizes = [check_integer("group_size", size, 1) for size in _per_stage("group_size", group_size)]
    factors = [check_number("expansion", each, 0.0, exclusive=True) for each in _per_stage("expansion", expansion)]

    def branch(stage: int, index: int, in_channels: int, out_channels: int) -> tuple[int, int]:
        width = int(branch_width(index, in_channels, out_channels, factors[stage]))
        groups = max(1, width // sizes[stage])
        channels = groups * min(sizes[stage], width)
        if channels < 2:  # one channel would be all mean to the standardised 1x1 convolution that ends the branch
            raise invalid("expansion", expansion, "leaves a branch fewer than 2 channels", "pass a larger one")
        return channels, groups

    return branch


def _per_stage(argument: str, value: Any) -> tuple[Any, ...]:
    """Return one value per stage of an argument that is one value, or one per stage."""
    if not isinstance(value, (tuple, list)):
        return (value,) * STAGES
    if len(value) != STAGES:
        rule = f"must be one value or one for each of the {STAGES} stages"
        raise invalid(argument, value, rule, f"pass {STAGES} of them, or one")
    return tuple(value)


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
        stem_stride: pixels of the input per cell after the stem, along each axis.
        places: of the blocks, stage by stage.
        block: makes a block of its place.
        final: from the last stage's map to the final features (an activation, with what belongs to it).
        num_features: channels of the final features.
        num_classes: outputs of the classifier; 0 for none.
        drop_rate: dropout of the pooled features, in [0, 1).
        feature_scale: factor of the pooled features: the final activation's gamma in normalizer-free
            networks, put here because a pooled vector is far smaller than a map or the classifier's weight.
        classifier_std: standard deviation of the classifier's initial weight; its bias starts at 0.

    Attributes:
        name: the name ``create_model`` built it by; empty if built otherwise.
        config: arguments with which ``create_model`` builds another like it.
        feature_info: channels and stride of each stage's map.
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
        stem_stride: int,
        places: Sequence[Sequence[BlockPlace]],
        block: Callable[[BlockPlace], nn.Module],
        final: nn.Module,
        num_features: int,
        num_classes: int,
        drop_rate: float,
        classifier_std: float,
        feature_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.name = ""
        self.config: dict[str, Any] = {}
        strides = [stem_stride * math.prod(stage[0].stride for stage in places[: end + 1]) for end in range(STAGES)]
        self.feature_info = tuple(
            FeatureInfo(f"stages.{index}", stage[-1].out_channels, strides[index]) for index, stage in enumerate(places)
        )
        self.num_features = num_features
        self.feature_scale = feature_scale
        self.num_classes = check_integer("num_classes", num_classes, 0)
        self.stem = stem
        self.stages = nn.ModuleList(nn.Sequential(*map(block, stage)) for stage in places)
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


@dataclass(frozen=True, kw_only=True)
class NFStyle:
    """What all blocks of one normalizer-free network have in common.

    Attributes:
        activation: copied into each block.
        gamma: of the activation.
        alpha: the branch's factor.
        skip_gain: initial skip gain; None for none.
        padding: "symmetric" or "same".
        convolution: class of the convolutions.
    """

    activation: nn.Module
    gamma: float
    alpha: float
    skip_gain: float | None
    padding: PaddingStyle
    convolution: type[ScaledConv2d] = ScaledWSConv2d

    @classmethod
    def of(cls, activation: Activation, alpha: float, skipinit_gain: float, **options: Any) -> NFStyle:
        """Return the style of a network's checked arguments; options are the padding and the convolution.

        Raises:
            ValueError: a value that breaks its rule.
        """
        __tracebackhide__ = True
        module, gamma = build_activation(activation)
        alpha, gain = check_number("alpha", alpha, 0.0), check_number("skipinit_gain", skipinit_gain)
        return cls(activation=module, gamma=gamma, alpha=alpha, skip_gain=gain, **options)

    @property
    def branch_scale(self) -> dict[str, Any]:
        """Arguments of the layer that ends a branch and carries its factor."""
        return {"alpha": self.alpha, "skip_gain": self.skip_gain}

    def without_branch_scale(self) -> NFStyle:
        """Return the style of a branch without factors, for blocks whose gate carries them."""
        return replace(self, alpha=1.0, skip_gain=None)


class NFBackbone(Backbone):
    """A normalizer-free network: its blocks follow a variance plan, its pooled features carry the last gamma.

    Args:
        block: makes a block of its place, its beta of the plan and the style.
        style: what the blocks have in common; ``final`` ends in its activation.
        network: ``places`` and the rest of ``Backbone``'s arguments.

    Attributes:
        alpha: factor of the branches.
        variance_plan: one entry per block.

    Raises:
        ValueError: a value that breaks its rule.
    """

    standardized = True

    def __init__(
        self, *, block: Callable[[BlockPlace, float, NFStyle], nn.Module], style: NFStyle, **network: Any
    ) -> None:
        plan = variance_plan([len(stage) for stage in network["places"]], style.alpha)
        super().__init__(
            block=lambda place: block(place, plan[place.index].beta, style), feature_scale=style.gamma, **network
        )
        self.alpha = style.alpha
        self.variance_plan = plan

    def expected_variances(self) -> list[float]:
        """Return the variance the plan expects after each block at initialisation, for skip gains of 1."""
        return [planned.expected_var for planned in self.variance_plan]
