"""Batch-normalised RegNets: the graph of the normalizer-free ones, for comparison with them.

    x_{l+1} = shortcut(act(x_l)) + f_l(act(x_l)),   f = norm conv1x1 . act gate norm conv3x3 . act norm conv1x1

A batch norm follows every convolution, the stem's, the shortcuts' and the head's too; there is no weight
standardization, no alpha, beta, gamma or skip gain, and no bias of a convolution. The gate keeps its factor 2.

Source: the comparison of Brock, De, Smith, ICLR 2021; Radosavovic et al. 2020 (arXiv 2003.13678).
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor, nn

from normfree.common.checks import check_integer
from normfree.models.nf_regnet import regnet_gate, regnet_head_channels, regnet_places, regnet_variants
from normfree.models.registry import register
from normfree.models.scaffold import Backbone, BlockPlace
from normfree.nn import Activation, AveragePool2x2, PaddingStyle, ScaledConv2d, StochasticDepth, build_activation


def _convolution_and_norm(
    in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, *, groups: int = 1, padding: PaddingStyle
) -> nn.Sequential:
    """Return a convolution (LeCun normal, no bias) and the batch norm of its output."""
    convolution = ScaledConv2d(
        in_channels, out_channels, kernel_size, stride, groups=groups, padding=padding, bias=False
    )
    return nn.Sequential(OrderedDict(conv=convolution, norm=nn.BatchNorm2d(out_channels)))


class BNRegNetBlock(nn.Module):
    """A block with a grouped convolution and batch norms: the equation at the top of this file.

    Args:
        place: channels, groups, stride and stochastic depth.
        activation: copied.
        gate: makes the layer after the grouped convolution, from its channels.
        padding: "symmetric" or "same".

    Source: Brock et al. 2021, appendix.
    """

    def __init__(
        self, place: BlockPlace, activation: nn.Module, gate: Callable[[int], nn.Module], padding: PaddingStyle
    ) -> None:
        super().__init__()
        inner, out = place.branch_channels, place.out_channels
        self.activation = copy.deepcopy(activation)
        self.conv0 = _convolution_and_norm(place.in_channels, inner, 1, padding=padding)
        self.conv1 = _convolution_and_norm(inner, inner, 3, place.stride, groups=place.groups, padding=padding)
        self.squeeze_excite = gate(inner)
        self.conv2 = _convolution_and_norm(inner, out, 1, padding=padding)
        self.pool = AveragePool2x2() if place.stride == 2 else nn.Identity()
        self.shortcut = _convolution_and_norm(place.in_channels, out, 1, padding=padding) if place.projects else None
        self.stochastic_depth = StochasticDepth(place.drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        activated = self.activation(x)
        shortcut = x if self.shortcut is None else self.shortcut(self.pool(activated))
        hidden = self.activation(self.conv0(activated))
        hidden = self.activation(self.squeeze_excite(self.conv1(hidden)))
        return shortcut + self.stochastic_depth(self.conv2(hidden))


@register(regnet_variants("bn_regnet_b"))
class BNRegNet(Backbone):
    """A batch-normalised RegNet with the graph, the sizes and the regularisation of ``NFRegNet``.

    Args:
        depths, base_widths, width, widths, group_size, expansion, activation, use_se, se_ratio,
            stochdepth_rate, drop_rate, train_size, test_size: as ``NFRegNet``'s.
        num_classes: outputs of the classifier, which starts at zero; 0 for none.
        in_channels: channels of the input.
        padding: "symmetric" or "same".

    Attributes:
        image_size: the test size.

    Raises:
        ValueError: a value that breaks its rule.

    Source: Brock et al. 2021.
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
        activation: Activation = "silu",
        use_se: bool = True,
        se_ratio: float = 0.5,
        stochdepth_rate: float = 0.1,
        drop_rate: float,
        train_size: int,
        test_size: int,
        num_classes: int = 1000,
        in_channels: int = 3,
        padding: PaddingStyle = "symmetric",
    ) -> None:
        network = (depths, base_widths, width, widths, in_channels, padding, stochdepth_rate)
        places = regnet_places(group_size, expansion, *network)
        act, _ = build_activation(activation)
        head_channels = regnet_head_channels(places)
        head = _convolution_and_norm(places[-1][-1].out_channels, head_channels, 1, padding=padding)
        super().__init__(
            stem=_convolution_and_norm(in_channels, places[0][0].in_channels, 3, 2, padding=padding),
            stem_stride=2,
            places=places,
            block=partial(BNRegNetBlock, activation=act, gate=regnet_gate(use_se, se_ratio), padding=padding),
            final=nn.Sequential(OrderedDict([*head.named_children(), ("activation", copy.deepcopy(act))])),
            num_features=head_channels,
            num_classes=num_classes,
            drop_rate=drop_rate,
            classifier_std=0.0,
        )
        self.train_size = check_integer("train_size", train_size, 1)
        self.image_size = self.test_size = check_integer("test_size", test_size, 1)
