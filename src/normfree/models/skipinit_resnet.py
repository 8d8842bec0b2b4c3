"""SkipInit ResNets: pre-activation, no normalizer, a learnable scalar that starts each branch at zero.

    x_{l+1} = shortcut + s * f_l(act(x_l)),   f = conv1x1 . act conv3x3 . act conv1x1

s   skip gain, learnable, one per block, starts at 0; it is in the weights of the branch's last convolution

Source: De, Smith 2020 (arXiv 2002.10444); the comparison of Brock, De, Smith, ICLR 2021.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from normfree.common.checks import check_number
from normfree.models.backbone import Backbone
from normfree.models.layout import BlockPlace
from normfree.models.registry import register
from normfree.models.resnet_common import ResNetLayout, resnet_variants
from normfree.nn import Activation, ScaledConv2d, build_activation


class SkipInitBlock(nn.Module):
    """A bottleneck block with a skip gain: the equation at the top of this file.

    Args:
        place: channels, stride and stochastic depth.
        activation: copied.
        skipinit_gain: initial skip gain.
        padding: "symmetric" or "same".

    Source: De, Smith 2020.
    """

    def __init__(self, place: BlockPlace, activation: nn.Module, skipinit_gain: float, padding: str) -> None:
        super().__init__()
        options: dict[str, Any] = {"padding": padding, "init_scale": math.sqrt(2)}
        inner, out = place.bottleneck, place.out_channels
        self.activation = copy.deepcopy(activation)
        self.conv0 = ScaledConv2d(place.in_channels, inner, 1, **options)
        self.conv1 = ScaledConv2d(inner, inner, 3, place.stride, **options)
        self.conv2 = ScaledConv2d(inner, out, 1, skip_gain=skipinit_gain, **options)
        self.shortcut = ScaledConv2d(place.in_channels, out, 1, place.stride, **options) if place.projects else None
        self.stochastic_depth = place.stochastic_depth()

    def forward(self, x: Tensor) -> Tensor:
        activated = self.activation(x)
        shortcut = x if self.shortcut is None else self.shortcut(activated)
        hidden = self.activation(self.conv0(activated))
        hidden = self.activation(self.conv1(hidden))
        return shortcut + self.stochastic_depth(self.conv2(hidden))


@register(resnet_variants("skipinit_resnet"))
class SkipInitResNet(Backbone):
    """A SkipInit ResNet with He-normal (fan-in) convolutions; all but the stem's have a bias.

    Args:
        depths: blocks per stage, four.
        width: multiplies the stages' 64, 128, 256, 512 channels and the stem's 16.
        widths: the stages' channels themselves, instead of ``width``.
        activation: a name, or a module, function or factory.
        stochdepth_rate: of the last block, nearly; grows linearly from 0. The paper's regularised runs: 0.1.
        drop_rate: dropout before the classifier. The paper's regularised runs: 0.25.
        skipinit_gain: initial value of every skip gain.
        stem: "imagenet" (7x7 of stride 2 and a max-pool), or "cifar" (3x3 of stride 1) for small images.
        num_classes: outputs of the classifier, which starts at zero; 0 for none.
        in_channels: channels of the input.
        padding: "symmetric" or "same".

    Raises:
        ValueError: a value that breaks its rule.

    Source: De, Smith 2020; Brock et al. 2021.
    """

    def __init__(
        self,
        *,
        depths: Sequence[int],
        width: float = 4,
        widths: Sequence[int] | None = None,
        activation: Activation = "relu",
        stochdepth_rate: float = 0.1,
        drop_rate: float = 0.25,
        skipinit_gain: float = 0.0,
        stem: str = "imagenet",
        num_classes: int = 1000,
        in_channels: int = 3,
        padding: str = "symmetric",
    ) -> None:
        layout = ResNetLayout(depths, width, widths, in_channels, padding, stochdepth_rate, stem)
        act, _ = build_activation(activation)
        gain = check_number("skipinit_gain", skipinit_gain)
        stem_convolution = partial(ScaledConv2d, bias=False, init_scale=math.sqrt(2))
        super().__init__(
            stem=layout.stem(stem_convolution),
            stages=[
                nn.Sequential(*(SkipInitBlock(place, act, gain, padding) for place in places))
                for places in layout.places()
            ],
            final=copy.deepcopy(act),
            feature_info=layout.feature_info(),
            num_features=layout.stage_channels[-1],
            num_classes=num_classes,
            drop_rate=drop_rate,
            classifier_std=0.0,
        )
