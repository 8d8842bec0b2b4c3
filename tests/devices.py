"""What tests of more than one device share: the same images, and when two devices agree."""

import torch


def images(count=4, size=64):
    """Standard gaussian images [count, 3, size, size] on the CPU, the same each time."""
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def close(actual, expected, share):
    """Whether the largest difference is at most a share of the largest expected value."""
    expected = expected.detach().double().cpu()
    return (actual.detach().double().cpu() - expected).abs().max() <= share * expected.abs().max()
