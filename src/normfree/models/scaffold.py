"""What every network here has: a stem, stages of blocks, a final layer, and a classifier."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Generic, TypeVar

from torch import Tensor, nn

from normfree.common.checks import (
    check_choice,
    check_flag,
    check_integer,
    check_integers,
    check_number,
    check_rate,
    invalid,
)
from normfree.nn import (
    PADDING_STYLES,
    Activation,
    MaxPool2d,
    PlannedBlock,
    ScaledConv2d,
    ScaledWSConv2d,
    SqueezeExcite,
    StochasticDepth,
    build_activation,
    variance_plan,
)


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


# MERGED from models/scaffold.py


STAGES = 4
# A quarter of it are 2 channels, the fewest a standardised 1x1 convolution can take: one would be all mean.
MINIMUM_WIDTH = 8


@dataclass(frozen=True)
class BlockPlace:
    """Where a bottleneck block stands.

    Attributes:
        stage: its stage, from 0.
        index: its number over the whole network, from 0.
        in_channels, out_channels: of the block.
        stride: of its 3x3 convolution and its shortcut.
        drop_rate: its probability of being skipped in training.
    """

    stage: int
    index: int
    in_channels: int
    out_channels: int
    stride: int
    drop_rate: float

    @property
    def bottleneck(self) -> int:
        """Channels inside the branch."""
        return self.out_channels // 4

    @property
    def projects(self) -> bool:
        """Whether the shortcut has to be a convolution because the shape changes."""
        return self.stride > 1 or self.in_channels != self.out_channels

    def stochastic_depth(self) -> StochasticDepth:
        """Return the layer that skips the branch at this place's rate."""
        return StochasticDepth(self.drop_rate)


Place = TypeVar("Place", bound=BlockPlace)


@dataclass(frozen=True)
class Layout(ABC, Generic[Place]):
    """The checked geometry of a network of four stages.

    Args:
        depths: blocks per stage, four positive integers.
        base_widths: channels of the stages before the width multiplier, four, each at least 8.
        width: the width multiplier.
        widths: channels of the stages themselves, each at least 8, instead of ``width``; None to use it.
        in_channels: channels of the input.
        padding: "symmetric" or "same".
        stochdepth_rate: block i of L is skipped in training with probability ``stochdepth_rate * i / L``.

    Raises:
        ValueError: a value that breaks its rule.
    """

    stage_strides: ClassVar[tuple[int, ...]]

    depths: Sequence[int]
    base_widths: Sequence[int]
    width: float
    widths: Sequence[int] | None
    in_channels: int
    padding: str
    stochdepth_rate: float

    def __post_init__(self) -> None:
        check_integers("depths", self.depths, STAGES)
        check_integers("base_widths", self.base_widths, STAGES, minimum=MINIMUM_WIDTH)
        check_number("width", self.width, 0.0, exclusive=True)
        if self.widths is not None:
            check_integers("widths", self.widths, STAGES, minimum=MINIMUM_WIDTH)
        elif min(self.stage_channels) < MINIMUM_WIDTH:
            rule = f"leaves a stage fewer than {MINIMUM_WIDTH} channels"
            least = math.ceil(1000 * MINIMUM_WIDTH / min(self.base_widths)) / 1000
            raise invalid("width", self.width, rule, f"pass width={least} or more")
        check_integer("in_channels", self.in_channels, 1)
        check_choice("padding", self.padding, PADDING_STYLES)
        check_rate("stochdepth_rate", self.stochdepth_rate)

    @property
    def stage_channels(self) -> tuple[int, ...]:
        """Output channels of the four stages."""
        return tuple(self.widths or (int(self.width * channels) for channels in self.base_widths))

    @property
    @abstractmethod
    def stem_stride(self) -> int:
        """Pixels of the input per cell after the stem, along each axis."""

    @property
    @abstractmethod
    def stem_channels(self) -> int:
        """Output channels of the stem."""

    @abstractmethod
    def complete(self, place: BlockPlace) -> Place:
        """Return the place of a block with what the family's blocks need beyond it."""

    def places(self) -> list[list[Place]]:
        """Return the places of all blocks, stage by stage."""
        places: list[list[Place]] = []
        blocks = sum(self.depths)
        channels, index = self.stem_channels, 0
        for stage, depth in enumerate(self.depths):
            places.append([])
            out_channels = self.stage_channels[stage]
            for position in range(depth):
                stride = self.stage_strides[stage] if position == 0 else 1
                rate = self.stochdepth_rate * index / blocks
                places[-1].append(self.complete(BlockPlace(stage, index, channels, out_channels, stride, rate)))
                channels, index = out_channels, index + 1
        return places

    def feature_info(self) -> tuple[FeatureInfo, ...]:
        """Return what each stage's map will be."""
        info, stride = [], self.stem_stride
        for stage, channels in enumerate(self.stage_channels):
            stride *= self.stage_strides[stage]
            info.append(FeatureInfo(f"stages.{stage}", channels, stride))
        return tuple(info)


# MERGED from models/scaffold.py


@dataclass(frozen=True, kw_only=True)
class NFBlockStyle:
    """What all blocks of one network have in common.

    Attributes:
        convolution: class of the convolutions.
        activation: copied into each block.
        gamma: of the activation.
        alpha: the branch's factor.
        skipinit_gain: initial skip gain; None for none.
        padding: "symmetric" or "same".
    """

    convolution: type[ScaledConv2d]
    activation: nn.Module
    gamma: float
    alpha: float
    skipinit_gain: float | None
    padding: str

    @property
    def branch_end(self) -> dict[str, Any]:
        """Arguments of the layer that ends a branch."""
        return {"alpha": self.alpha, "skip_gain": self.skipinit_gain}

    def bare(self) -> NFBlockStyle:
        """Return the style of a branch without factors, for blocks whose gate carries them."""
        return replace(self, alpha=1.0, skipinit_gain=None)


def nf_style(
    activation: Activation,
    alpha: float,
    skipinit_gain: float,
    padding: str,
    convolution: type[ScaledConv2d] = ScaledWSConv2d,
) -> NFBlockStyle:
    """Return what the blocks of a normalizer-free network have in common, checked.

    Args:
        activation: a name, or a module, function or factory.
        alpha: factor of the branches, at least 0.
        skipinit_gain: initial skip gain.
        padding: "symmetric" or "same".
        convolution: class of the convolutions.

    Raises:
        ValueError: a value that breaks its rule.
    """
    module, gamma = build_activation(activation)
    return NFBlockStyle(
        convolution=convolution,
        activation=module,
        gamma=gamma,
        alpha=check_number("alpha", alpha, 0.0),
        skipinit_gain=check_number("skipinit_gain", skipinit_gain),
        padding=padding,
    )


class NFBackbone(Backbone):
    """A normalizer-free network: its blocks follow a variance plan, its pooled features carry the last gamma.

    Args:
        layout: where the blocks stand.
        block: makes a block of its place, its entry of the plan and the style.
        style: what the blocks have in common; ``final`` ends in its activation.
        stem, final, num_features, num_classes, drop_rate, classifier_std: as ``Backbone``'s.

    Attributes:
        alpha: factor of the branches.
        variance_plan: one entry per block.

    Raises:
        ValueError: a value that breaks its rule.
    """

    standardized = True

    def __init__(
        self,
        *,
        layout: Layout[Place],
        block: Callable[[Place, PlannedBlock, NFBlockStyle], nn.Module],
        style: NFBlockStyle,
        stem: nn.Module,
        final: nn.Module,
        num_features: int,
        num_classes: int,
        drop_rate: float,
        classifier_std: float,
    ) -> None:
        plan = variance_plan(layout.depths, style.alpha)
        super().__init__(
            stem=stem,
            stages=[
                nn.Sequential(*(block(place, plan[place.index], style) for place in places))
                for places in layout.places()
            ],
            final=final,
            feature_info=layout.feature_info(),
            num_features=num_features,
            num_classes=num_classes,
            drop_rate=drop_rate,
            classifier_std=classifier_std,
            feature_scale=style.gamma,
        )
        self.alpha = style.alpha
        self.variance_plan = plan

    def expected_variances(self) -> list[float]:
        """Return the variance the plan expects after each block at initialisation, for skip gains of 1."""
        return [planned.expected_var for planned in self.variance_plan]


# MERGED from models/scaffold.py
#
# A ResNet has four stages of bottleneck blocks (1x1 to a quarter of the width, 3x3 with the stride, 1x1 back),
# of 64, 128, 256 and 512 channels times the width multiplier, after a 7x7 convolution of stride 2 to a quarter
# of the first stage's channels and a 3x3 max-pool of stride 2. Images of 32 pixels woul


RESNET_DEPTHS: dict[int, tuple[int, int, int, int]] = {
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    200: (3, 24, 36, 3),
    288: (24, 24, 24, 24),
    600: (50, 50, 50, 50),
}


@dataclass(frozen=True)
class StemShape:
    """The geometry of a stem.

    Attributes:
        kernel_size, stride: of its convolution.
        pools: whether a 3x3 max-pool of stride 2 ends it.
    """

    kernel_size: int
    stride: int
    pools: bool


STEMS = {"imagenet": StemShape(7, 2, pools=True), "cifar": StemShape(3, 1, pools=False)}


def resnet_variants(prefix: str) -> dict[str, Mapping[str, Any]]:
    """Return the registry's entries of a family: every depth under ``<prefix><depth>``."""
    return {f"{prefix}{depth}": {"depths": blocks} for depth, blocks in RESNET_DEPTHS.items()}


@dataclass(frozen=True)
class ResNetLayout(Layout[BlockPlace]):
    """The checked geometry of a ResNet.

    Args: as ``Layout``'s, but ``base_widths``, which are a ResNet's own, and
        stem_style: "imagenet" or "cifar", as at the top of this file.

    Raises:
        ValueError: a value that breaks its rule.
    """

    stage_strides = (1, 2, 2, 2)

    base_widths: Sequence[int] = field(default=(64, 128, 256, 512), init=False)
    stem_style: str = "imagenet"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("stem", self.stem_style, tuple(STEMS))

    @property
    def stem_stride(self) -> int:
        """Pixels of the input per cell after the stem."""
        shape = STEMS[self.stem_style]
        return shape.stride * (2 if shape.pools else 1)

    @property
    def stem_channels(self) -> int:
        """Output channels of the stem: as many as the first stage's bottleneck, 64 at the usual width 4."""
        return self.stage_channels[0] // 4

    def complete(self, place: BlockPlace) -> BlockPlace:
        """Return the place as it is: its stage, channels and stride are all a ResNet's block needs."""
        return place

    def stem(self, convolution: Callable[..., nn.Module], **layers: nn.Module) -> nn.Sequential:
        """Return the stem.

        Args:
            convolution: makes its convolution of channels in and out, kernel size, stride and ``padding``.
            layers: follow the convolution, by name; the max-pool, if there is one, comes last.
        """
        shape = STEMS[self.stem_style]
        first = convolution(self.in_channels, self.stem_channels, shape.kernel_size, shape.stride, padding=self.padding)
        pool = {"pool": MaxPool2d(3, 2, padding=self.padding)} if shape.pools else {}
        return nn.Sequential(OrderedDict(conv=first, **layers, **pool))


# MERGED from models/scaffold.py
#
# A block has a 1x1 convolution, a 3x3 convolution in groups of a fixed size with the stride, and a 1x1
# convolution back; its shortcut halves by average pooling. RegNets expand a block's input; NFNets
# (``normfree.models.nfnet``) take a share of its output.
#
# Source: Radosavovic et al. 2020 (a


# Widths, to be multiplied by `width`; depths; training and test image size; dropout.
REGNET_SIZES: dict[int, tuple[tuple[int, ...], tuple[int, ...], int, int, float]] = {
    0: ((48, 104, 208, 440), (1, 3, 6, 6), 192, 224, 0.2),
    1: ((48, 104, 208, 440), (2, 4, 7, 7), 224, 256, 0.2),
    2: ((56, 112, 232, 488), (2, 4, 8, 8), 240, 272, 0.3),
    3: ((56, 128, 248, 528), (2, 5, 9, 9), 288, 320, 0.3),
    4: ((64, 144, 288, 616), (2, 6, 11, 11), 320, 384, 0.4),
    5: ((80, 168, 336, 704), (3, 7, 14, 14), 384, 456, 0.4),
    6: ((88, 184, 376, 792), (3, 8, 16, 16), 448, 528, 0.5),
    7: ((96, 208, 416, 880), (4, 10, 19, 19), 512, 600, 0.5),
    8: ((104, 232, 456, 968), (4, 11, 22, 22), 600, 672, 0.5),
}


def regnet_variants(prefix: str) -> dict[str, Mapping[str, Any]]:
    """Return the registry's entries of a family: every size under ``<prefix><size>``."""
    names = ("base_widths", "depths", "train_size", "test_size", "drop_rate")
    return {f"{prefix}{size}": dict(zip(names, values, strict=True)) for size, values in REGNET_SIZES.items()}


@dataclass(frozen=True)
class GroupedPlace(BlockPlace):
    """Where a block with a grouped 3x3 convolution stands.

    Attributes:
        branch_width: channels the branch asks for, before rounding down to whole groups.
        group_size: channels of a group; a narrower branch is one group.
    """

    branch_width: int
    group_size: int

    @property
    def groups(self) -> int:
        """Groups of the 3x3 convolution."""
        return max(1, self.branch_width // self.group_size)

    @property
    def bottleneck(self) -> int:
        """Channels inside the branch."""
        return self.groups * min(self.group_size, self.branch_width)


@dataclass(frozen=True)
class GroupedLayout(Layout[GroupedPlace]):
    """The checked geometry of a network of four stages of blocks with grouped convolutions.

    Args: as ``Layout``'s, and
        group_size: channels of a group, one value or one per stage.
        expansion: factor of the branches' width, one value or one per stage.

    Raises:
        ValueError: a value that breaks its rule.
    """

    group_size: int | Sequence[int]
    expansion: float | Sequence[float]

    def __post_init__(self) -> None:
        super().__post_init__()
        for size in _per_stage("group_size", self.group_size):
            check_integer("group_size", size, 1)
        for factor in _per_stage("expansion", self.expansion):
            check_number("expansion", factor, 0.0, exclusive=True)
        if any(place.bottleneck < 2 for places in self.places() for place in places):
            # One channel would be all mean to the standardised 1x1 convolution that ends the branch.
            raise invalid("expansion", self.expansion, "leaves a branch fewer than 2 channels", "pass a larger one")

    @abstractmethod
    def branch_width(self, place: BlockPlace, expansion: float) -> float:
        """Return the channels that the branch of the block at ``place`` asks for."""

    def complete(self, place: BlockPlace) -> GroupedPlace:
        """Return the place of a block with its branch's width and its group size."""
        expansion = _per_stage("expansion", self.expansion)[place.stage]
        group_size = _per_stage("group_size", self.group_size)[place.stage]
        return GroupedPlace(**vars(place), branch_width=int(self.branch_width(place, expansion)), group_size=group_size)


class RegNetLayout(GroupedLayout):
    """The geometry of a RegNet: every stage halves; a branch is wider than the block's input, except the first.

    Args: as ``GroupedLayout``'s; ``expansion`` is the factor of a block's input channels.
    """

    stage_strides = (2, 2, 2, 2)

    @property
    def stem_stride(self) -> int:
        """Pixels of the input per cell after the stem."""
        return 2

    @property
    def stem_channels(self) -> int:
        """Output channels of the stem."""
        return self.stage_channels[0]

    @property
    def head_channels(self) -> int:
        """Output channels of the convolution after the last stage: 1280 for a last stage of 440."""
        return int(1280 * self.stage_channels[-1] // 440)

    def branch_width(self, place: BlockPlace, expansion: float) -> float:
        """Return the channels that the branch of the block at ``place`` asks for."""
        return place.in_channels * (expansion if place.index > 0 else 1)


def regnet_gate(use_se: bool, se_ratio: float) -> Callable[[int], nn.Module]:
    """Return a function from channels to the layer in the middle of a RegNet's branch.

    Args:
        use_se: a squeeze-excite gate; otherwise nothing.
        se_ratio: hidden units of the gate per channel.

    Raises:
        ValueError: use_se not a bool; a ratio that is not above 0.
    """
    ratio = check_number("se_ratio", se_ratio, 0.0, exclusive=True)
    return partial(SqueezeExcite, ratio=ratio) if check_flag("use_se", use_se) else lambda channels: nn.Identity()


def _per_stage(argument: str, value: Any) -> tuple[Any, ...]:
    """Return one value per stage of an argument that is one value, or one per stage."""
    if not isinstance(value, (tuple, list)):
        return (value,) * STAGES
    if len(value) != STAGES:
        rule = f"must be one value or one for each of the {STAGES} stages"
        raise invalid(argument, value, rule, f"pass {STAGES} of them, or one")
    return tuple(value)
