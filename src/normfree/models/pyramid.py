"""A network's stages as a pyramid of feature maps, in the form torchvision's heads take.

    level_i = act_i(stage_i(... stage_0(stem(x))))

act_i is what the next block begins with. The stages of a pre-activation network end in the bare residual stream: it is
not rectified, it grows with depth, and all convolutions of the network itself see it through an activation (and a
normalizer, where there is one). So do a head's. Post-activation networks end their stages activated.

A normalizer-free level is not rescaled, as nothing is in its network: the factor that gives it variance 1 at
initialisation, gamma / beta, belongs in the weight of the head's first convolution, and is given beside the level.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, cast

from torch import Tensor, nn

from normfree.common.checks import check_flag, invalid, is_integer
from normfree.models.registry import check_backbone
from normfree.models.resnets import PreactivationBlock
from normfree.models.scaffold import Backbone, FeatureInfo, NFBackbone


@dataclass(frozen=True)
class PyramidLevel(FeatureInfo):
    """One map of a pyramid.

    Attributes:
        name: its key in the pyramid's output.
        channels: its channels.
        stride: pixels of the input per cell, along each axis.
        input_scale: gamma / beta, for the first convolution of a normalizer-free head
            (``ScaledWSConv2d(level.channels, ..., input_scale=level.input_scale)``); 1 for other families, and
            where the level is not activated.
    """

    input_scale: float


class FeaturePyramidBackbone(nn.Module):
    """The maps of a model's stages by name, for detection and segmentation heads.

    >>> body = FeaturePyramidBackbone(normfree.create_model("nf_resnet50"))  # doctest: +SKIP
    >>> fpn = torchvision.ops.FeaturePyramidNetwork([level.channels for level in body.levels], 256)  # doctest: +SKIP

    Args:
        model: a model of ``create_model``; its stem and stages are shared, not copied, and keep their names.
            Its final layers and classifier, and stages after the last one asked for, are left out, so that no
            parameter is without a gradient.
        out_indices: the stages to return, from 0, ascending.
        names: one key per level; "0", "1", ... by default. torchvision's segmentation models ask for "out" and "aux".
        activated: whether each level ends in a copy of what the next block begins with (see the top of this file);
            otherwise the bare residual stream comes out.

    Attributes:
        levels: name, channels, stride and input_scale of each map.

    Raises:
        ValueError: a model of another kind, an index that is none, or names that do not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        names: Sequence[str] | None = None,
        *,
        activated: bool = True,
    ) -> None:
        super().__init__()
        model = check_backbone(model)
        self.out_indices = _check_indices(out_indices, len(model.stages))
        check_flag("activated", activated)
        keys = _check_names(names, len(self.out_indices))
        last = self.out_indices[-1] + 1
        self.stem = model.stem
        self.stages = model.stages[:last]
        # A list: a dict of modules takes no name that is an attribute of its own, such as "type".
        self.activations = nn.ModuleList(
            _next_activation(model, i) if activated else nn.Identity() for i in self.out_indices
        )
        scales = _input_scales(model) if activated else [1.0] * len(model.stages)
        self.levels = tuple(
            PyramidLevel(key, model.feature_info[index].channels, model.feature_info[index].stride, scales[index])
            for key, index in zip(keys, self.out_indices, strict=True)
        )

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        """Return the levels [N, channels, ceil(H / stride), ceil(W / stride)] of x [N, in_channels, H, W]."""
        x = self.stem(x)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        chosen = zip(self.levels, self.activations, self.out_indices, strict=True)
        return OrderedDict((level.name, activation(maps[index])) for level, activation, index in chosen)


def _check_indices(indices: Sequence[int], stages: int) -> tuple[int, ...]:
    listed = isinstance(indices, (tuple, list)) and len(indices) > 0
    valid = listed and all(is_integer(index) and 0 <= index < stages for index in indices)
    if not valid or sorted(set(indices)) != list(indices):
        rule = f"must be ascending stage numbers from 0 to {stages - 1}"
        raise invalid("out_indices", indices, rule, f"pass {tuple(range(stages))} or some of them")
    return tuple(indices)


def _check_names(names: Sequence[str] | None, count: int) -> list[str]:
    if names is None:
        return [str(position) for position in range(count)]
    listed = isinstance(names, (tuple, list)) and all(isinstance(name, str) and name for name in names)
    if not listed or len(set(names)) != count or len(names) != count:
        rule = "must be one name per level, each its own"
        raise invalid("names", names, rule, f"pass {count} names, or None")
    return list(names)


def _next_activation(model: Backbone, stage: int) -> nn.Module:
    """Return a copy of what is done to the map of a stage before the next convolution sees it."""
    if model.post_activation:
        return nn.Identity()
    blocks: Any = model.stages[min(stage + 1, len(model.stages) - 1)]
    if not isinstance(blocks[0], PreactivationBlock):
        return copy.deepcopy(blocks[0].activation)
    return copy.deepcopy(blocks[0].pre0 if stage + 1 < len(model.stages) else model.final)


def _input_scales(model: Backbone) -> list[float]:
    """Return gamma / beta of the map of each stage; 1 where there is no variance plan."""
    if not isinstance(model, NFBackbone):
        return [1.0] * len(model.stages)
    variances = model.expected_variances()
    ends = accumulate(len(cast("nn.Sequential", stage)) for stage in model.stages)
    return [model.feature_scale * variances[end - 1] ** -0.5 for end in ends]
