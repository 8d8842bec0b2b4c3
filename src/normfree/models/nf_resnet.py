"""Normalizer-free ResNets, without a scalar multiplication of any feature map.

    x_{l+1} = x_l + alpha * s * f_l(act(x_l) / beta_l)

alpha   factor of the branches, 0.2: the variance grows by alpha^2 per block
s       skip gain, learnable, one per block, starts at 0
beta    expected standard deviation of x_l, from the variance plan
gamma   1 / sqrt(Var[act(z)]): makes an activation variance preserving

gamma and beta are in the weights of the convolutions that follow them, alpha * s is in those of the branch's
last convolution (or in the squeeze-excite gate). The final activation's gamma, which no convolution follows,
is on the pooled features.

Source: Brock, De, Smith, *Characterizing signal propagation to close the performance gap in unnormalized
ResNets*, ICLR 2021.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from normfree.common.checks import check_choice, check_flag, check_number
from normfree.models.registry import register
from normfree.models.scaffold import BlockPlace, NFBackbone, NFBlockStyle, ResNetLayout, nf_style, resnet_variants
from normfree.nn import Activation, PlannedBlock, ScaledConv2d, ScaledWSConv2d, SqueezeExcite

CONVOLUTIONS: dict[str, type[ScaledConv2d]] = {"scaled_ws": ScaledWSConv2d, "scaled": ScaledConv2d}


class NFBlock(nn.Module):
    """A normalizer-free bottleneck block: the equation at the top of this file.

    Args:
        place: channels, stride and stochastic depth.
        planned: the block's entry of the variance plan.
        style: what it shares with the network's other blocks.

    Source: Brock et al. 2021, section 3.
    """

    def __init__(self, place: BlockPlace, planned: PlannedBlock, style: NFBlockStyle) -> None:
        super().__init__()
        options: dict[str, Any] = {"padding": style.padding, "input_scale": style.gamma}
        downscaled = {**options, "input_scale": style.gamma / planned.beta}
        convolution, inner, out = style.convolution, place.bottleneck, place.out_channels
        self.activation = copy.deepcopy(style.activation)
        self.conv0 = convolution(place.in_channels, inner, 1, **downscaled)
        self.conv1 = convolution(inner, inner, 3, place.stride, **options)
        self.conv2 = convolution(inner, out, 1, **options, **style.branch_end)
        self.shortcut = convolution(place.in_channels, out, 1, place.stride, **downscaled) if place.projects else None
        self.stochastic_depth = place.stochastic_depth()

    def branch(self, activated: Tensor) -> Tensor:
        """Return ``alpha * s * f(activated / beta)``, [N, out_channels, H', W']."""
        hidden = self.activation(self.conv0(activated))
        hidden = self.activation(self.conv1(hidden))
        return self.conv2(hidden)

    def forward(self, x: Tensor) -> Tensor:
        activated = self.activation(x)
        shortcut = x if self.shortcut is None else self.shortcut(activated)
        return shortcut + self.stochastic_depth(self.branch(activated))


class NFSqueezeExciteBlock(NFBlock):
    """A normalizer-free bottleneck block whose branch ends in a squeeze-excite gate, which carries alpha * s.

    Args:
        place, planned, style: as ``NFBlock``'s.
        se_ratio: hidden units of the gate per output channel.

    Source: Brock et al. 2021, section 3 and appendix.
    """

    def __init__(self, place: BlockPlace, planned: PlannedBlock, style: NFBlockStyle, se_ratio: float) -> None:
        super().__init__(place, planned, style.bare())
        self.squeeze_excite = SqueezeExcite(place.out_channels, se_ratio, **style.branch_end)

    def branch(self, activated: Tensor) -> Tensor:
        """Return ``alpha * s * f(activated / beta)``, [N, out_channels, H', W']."""
        hidden = self.activation(self.conv0(activated))
        hidden = self.activation(self.conv1(hidden))
        return self.squeeze_excite(self.conv2(hidden))


@register(resnet_variants("nf_resnet"))
class NFResNet(NFBackbone):
    """A normalizer-free ResNet.

    Args:
        depths: blocks per stage, four.
        width: multiplies the stages' 64, 128, 256, 512 channels and the stem's 16.
        widths: the stages' channels themselves, instead of ``width``.
        alpha: factor of the branches, at least 0: the variance grows by its square per block.
        activation: a name, or a module, function or factory (its gamma is then integrated).
        use_se: whether branches end in a squeeze-excite gate.
        se_ratio: hidden units of the gate per channel.
        stochdepth_rate: of the last block, nearly; grows linearly from 0. The paper's regularised runs: 0.1.
        drop_rate: dropout before the classifier. The paper's regularised runs: 0.25.
        skipinit_gain: initial value of every skip gain; 0 in the paper, 1 to draw its plots.
        conv: "scaled_ws", or "scaled" for plain LeCun weights with the same gamma and beta (the paper's
            mean-shift figure).
        stem: "imagenet" (7x7 of stride 2 and a max-pool), or "cifar" (3x3 of stride 1) for small images.
        num_classes: outputs of the classifier; 0 for none.
        in_channels: channels of the input.
        padding: "symmetric" or "same".

    Raises:
        ValueError: a value that breaks its rule.

    Source: Brock et al. 2021; sizes and constants of the official definition.
    """

    def __init__(
        self,
        *,
        depths: Sequence[int],
        width: float = 4,
        widths: Sequence[int] | None = None,
        alpha: float = 0.2,
        activation: Activation = "relu",
        use_se: bool = False,
        se_ratio: float = 0.25,
        stochdepth_rate: float = 0.1,
        drop_rate: float = 0.25,
        skipinit_gain: float = 0.0,
        conv: str = "scaled_ws",
        stem: str = "imagenet",
        num_classes: int = 1000,
        in_channels: int = 3,
        padding: str = "symmetric",
    ) -> None:
        layout = ResNetLayout(depths, width, widths, in_channels, padding, stochdepth_rate, stem)
        convolution = CONVOLUTIONS[check_choice("conv", conv, tuple(CONVOLUTIONS))]
        style = nf_style(activation, alpha, skipinit_gain, padding, convolution)
        ratio = check_number("se_ratio", se_ratio, 0.0, exclusive=True)
        gated = partial(NFSqueezeExciteBlock, se_ratio=ratio)
        block = gated if check_flag("use_se", use_se) else NFBlock
        super().__init__(
            layout=layout,
            block=block,
            style=style,
            stem=layout.stem(style.convolution),
            final=copy.deepcopy(style.activation),
            num_features=layout.stage_channels[-1],
            num_classes=num_classes,
            drop_rate=drop_rate,
            classifier_std=0.01,
        )
