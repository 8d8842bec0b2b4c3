"""Normalizer-free RegNets, without a multiplication of any activation by a number.

    x_{l+1} = shortcut(a_l) + alpha * s * f_l(a_l),   a_l = act(x_l) / beta_l
    f = conv1x1 . act gate conv3x3 . act conv1x1

alpha   factor of the branches, 0.2: the variance grows by alpha^2 per block
s       skip gain, learnable, one per block, starts at 0
beta    expected standard deviation of x_l, from the variance plan
gamma   1 / sqrt(Var[act(z)]): makes an activation variance preserving
gate    squeeze-excite, 2 * sigmoid(...), in the middle of the branch

The shortcut is x_l, or a 1x1 convolution of a_l where the shape changes, halved first by a 2x2 average pool
where the stride is 2. gamma and beta are in the weights of the convolutions that follow them, alpha * s is in
those of the branch's last convolution. The final activation's gamma, which no convolution follows, is on the
pooled features.

On white noise the average pool cuts the shortcut's variance by four, which the plan does not know; on
photographs, whose neighbouring pixels agree, it hardly does.

Source: Brock, De, Smith, *Characterizing signal propagation to close the performance gap in unnormalized
ResNets*, ICLR 2021, section 5 and appendix.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from normfree.common.checks import check_integer
from normfree.models.registry import register
from normfree.models.scaffold import (
    GroupedPlace,
    NFBackbone,
    NFBlockStyle,
    RegNetLayout,
    nf_style,
    regnet_gate,
    regnet_variants,
)
from normfree.nn import Activation, AveragePool2x2, PlannedBlock, ScaledWSConv2d


class NFRegNetBlock(nn.Module):
    """A normalizer-free block with a grouped convolution: the equation at the top of this file.

    Args:
        place: channels, groups, stride and stochastic depth.
        planned: the block's entry of the variance plan.
        style: what it shares with the network's other blocks.
        gate: makes the layer after the grouped convolution, from its channels.

    Source: Brock et al. 2021, appendix.
    """

    def __init__(
        self, place: GroupedPlace, planned: PlannedBlock, style: NFBlockStyle, gate: Callable[[int], nn.Module]
    ) -> None:
        super().__init__()
        options: dict[str, Any] = {"padding": style.padding, "input_scale": style.gamma}
        downscaled = {**options, "input_scale": style.gamma / planned.beta}
        convolution, inner, out = style.convolution, place.bottleneck, place.out_channels
        self.activation = copy.deepcopy(style.activation)
        self.conv0 = convolution(place.in_channels, inner, 1, **downscaled)
        self.conv1 = convolution(inner, inner, 3, place.stride, groups=place.groups, **options)
        self.squeeze_excite = gate(inner)
        self.conv2 = convolution(inner, out, 1, **options, **style.branch_end)
        self.pool = AveragePool2x2() if place.stride == 2 else nn.Identity()
        self.shortcut = convolution(place.in_channels, out, 1, **downscaled) if place.projects else None
        self.stochastic_depth = place.stochastic_depth()

    def branch(self, activated: Tensor) -> Tensor:
        """Return ``alpha * s * f(activated / beta)``, [N, out_channels, H', W']."""
        hidden = self.activation(self.conv0(activated))
        hidden = self.activation(self.squeeze_excite(self.conv1(hidden)))
        return self.conv2(hidden)

    def forward(self, x: Tensor) -> Tensor:
        activated = self.activation(x)
        shortcut = x if self.shortcut is None else self.shortcut(self.pool(activated))
        return shortcut + self.stochastic_depth(self.branch(activated))


@register(regnet_variants("nf_regnet_b"))
class NFRegNet(NFBackbone):
    """A normalizer-free RegNet.

    Args:
        depths: blocks per stage, four.
        base_widths: the stages' channels before the width multiplier, four.
        width: multiplies ``base_widths``.
        widths: the stages' channels themselves, instead of ``width``.
        group_size: channels of a group of the 3x3 convolutions, one value or one per stage; a branch is rounded
            down to whole groups, and a branch narrower than that is one group.
        expansion: channels of a branch per input channel of its block, one value or one per stage; the network's
            first block has 1.
        alpha: factor of the branches, at least 0: the variance grows by its square per block.
        activation: a name, or a module, function or factory (its gamma is then integrated).
        use_se: whether branches have a squeeze-excite gate.
        se_ratio: hidden units of the gate per channel of the branch.
        stochdepth_rate: of the last block, nearly; grows linearly from 0.
        drop_rate: dropout before the classifier.
        skipinit_gain: initial value of every skip gain; 0 in the paper, 1 to draw its plots.
        train_size, test_size: image sizes, in pixels, that the variant is trained and tested at; kept as
            attributes, any size runs.
        num_classes: outputs of the classifier, which starts at zero; 0 for none.
        in_channels: channels of the input.
        padding: "symmetric" or "same".

    Attributes:
        image_size: the test size.

    Raises:
        ValueError: a value that breaks its rule.

    Source: Brock et al. 2021; sizes and constants of the official definition.
    """

    def __init__(
        self,
        *,
        depths: Sequence[int],
        base_widths: Sequence[int],
        width: float = 0.75,
        widths: Sequence[int] | None = None,
        group_size: int | Sequence[int] = 8,
        expansion: float | Sequence[float] = 2.25,
        alpha: float = 0.2,
        activation: Activation = "silu",
        use_se: bool = True,
        se_ratio: float = 0.5,
        stochdepth_rate: float = 0.1,
        drop_rate: float,
        skipinit_gain: float = 0.0,
        train_size: int,
        test_size: int,
        num_classes: int = 1000,
        in_channels: int = 3,
        padding: str = "symmetric",
    ) -> None:
        layout = RegNetLayout(
            depths, base_widths, width, widths, in_channels, padding, stochdepth_rate, group_size, expansion
        )
        style = nf_style(activation, alpha, skipinit_gain, padding)
        block = partial(NFRegNetBlock, gate=regnet_gate(use_se, se_ratio))
        # No activation precedes the head's convolution, nor a beta: its input is the last block's sum as it is.
        head = ScaledWSConv2d(layout.stage_channels[-1], layout.head_channels, 1, padding=padding)
        super().__init__(
            layout=layout,
            block=block,
            style=style,
            stem=nn.Sequential(
                OrderedDict(conv=ScaledWSConv2d(in_channels, layout.stem_channels, 3, 2, padding=padding))
            ),
            final=nn.Sequential(OrderedDict(conv=head, activation=copy.deepcopy(style.activation))),
            num_features=layout.head_channels,
            num_classes=num_classes,
            drop_rate=drop_rate,
            classifier_std=0.0,
        )
        self.train_size = check_integer("train_size", train_size, 1)
        self.image_size = self.test_size = check_integer("test_size", test_size, 1)
