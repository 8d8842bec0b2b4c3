"""What the normalizer-free families share: the style of their blocks, and the variance plan they are built to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from normfree.common.checks import check_number
from normfree.models.backbone import Backbone
from normfree.models.layout import Layout, Place
from normfree.nn import (
    Activation,
    PlannedBlock,
    ScaledConv2d,
    ScaledWSConv2d,
    build_activation,
    variance_plan,
)


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
