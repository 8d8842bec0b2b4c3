"""MixUp and CutMix, each pair of a batch by its own draw.

Sources: Zhang et al., *mixup: Beyond Empirical Risk Minimization*, ICLR 2018; Yun et al., *CutMix*, ICCV 2019.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def partners(count: int) -> Tensor:
    """Who is mixed with whom: each example with the next, the last with the first."""
    return torch.arange(1, count + 1) % max(count, 1)


def mixup(images: Tensor, targets: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Blend each image with its partner: share · own + (1 − share) · partner's, and the targets likewise.

    Args:
        images: [N, C, H, W], floating point.
        targets: [N, classes], probabilities.
        share: [N], of the own image, in 0 to 1.
    """
    other = partners(len(images)).to(images.device)
    own = share.to(images).view(-1, 1, 1, 1)
    return torch.lerp(images[other], images, own), torch.lerp(targets[other], targets, own.view(-1, 1).to(targets))


def cutmix(images: Tensor, targets: Tensor, share: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """Put a box of each partner into the image; the targets mix by the box's true area.

    Args:
        images: [N, C, H, W].
        targets: [N, classes], probabilities.
        share: [N], the part of the own image that is asked for; the box is clipped at the borders.
        centre: [N, 2], of the box (row, column), in 0 to 1.
    """
    height, width = images.shape[2:]
    other = partners(len(images)).to(images.device)
    side = (1 - share).sqrt()
    box_rows = _inside(centre[:, 0] * height, side * height / 2, height)
    box_columns = _inside(centre[:, 1] * width, side * width / 2, width)
    box = (box_rows[:, :, None] & box_columns[:, None, :]).to(images.device)
    covered = box.float().mean(dim=(1, 2)).to(targets).unsqueeze(1)
    return torch.where(box.unsqueeze(1), images[other], images), torch.lerp(targets, targets[other], covered)


def _inside(centre: Tensor, half: Tensor, size: int) -> Tensor:
    """Which of ``size`` pixels lie within half a side of the centre, [N, size]."""
    pixels = torch.arange(size) + 0.5
    return (pixels - centre[:, None]).abs() < half[:, None]


def mix(
    images: Tensor, targets: Tensor, *, mixup_beta: float, cutmix_beta: float, draws: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """MixUp on the first half of a batch and CutMix on the second, or the one that is on on all of it.

    Args:
        images: [N, C, H, W], floating point.
        targets: [N, classes], probabilities.
        mixup_beta: parameter of the beta distribution of MixUp's shares; 0 is off.
        cutmix_beta: of CutMix's; 0 is off.
        draws: a generator.
    """
    count = len(images)
    blended = 0 if not mixup_beta else math.ceil(count / 2) if cutmix_beta else count
    shares = draws.beta(mixup_beta or 1, mixup_beta or 1, count), draws.beta(cutmix_beta or 1, cutmix_beta or 1, count)
    centres = draws.random((count, 2))
    to_mix, to_cut, centre = (torch.from_numpy(values).float() for values in (*shares, centres))
    parts = []
    if blended:
        parts.append(mixup(images[:blended], targets[:blended], to_mix[:blended]))
    if blended < count and cutmix_beta:
        parts.append(cutmix(images[blended:], targets[blended:], to_cut[blended:], centre[blended:]))
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
