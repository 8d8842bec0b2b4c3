"""One value per channel has no variance, and is never called healthy."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import normfree


def dense(layers: int = 40) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(part for _ in range(layers) for part in (nn.Linear(64, 64), nn.ReLU())))


class Block(nn.Module):
    """x + f(x), which doubles the variance."""

    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        self.layer = nn.Linear(channels, channels)

    def forward(self, x):
        return x + 2 * self.layer(x)


class Token(nn.Module):
    """A class token that blocks of its own follow, beside a stream of patches."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 32))
        self.read, self.blocks, self.head = nn.Linear(32, 32), nn.Sequential(*(Block() for _ in range(blocks))), Block()

    def forward(self, x):
        x = self.head(self.read(x))
        return self.blocks(self.token + x.mean(1, keepdim=True))


def pooled(layers: int, *, pool: bool = True) -> nn.Module:
    torch.manual_seed(0)
    behind = [part for _ in range(layers) for part in (nn.ReLU(), nn.Conv2d(16, 16, 1))]
    pools = [nn.AdaptiveAvgPool2d(1)] if pool else []
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), *pools, *behind)


def generator() -> nn.Module:
    """Of one latent vector maps: they have variances, and nothing to compare them with."""
    torch.manual_seed(0)
    layers = [part for _ in range(5) for part in (nn.ConvTranspose2d(16, 16, 4, 2, 1), nn.ReLU())]
    return nn.Sequential(nn.ConvTranspose2d(16, 16, 4), nn.ReLU(), *layers)


def severity(model: nn.Module, batch, **options) -> str | None:
    plot = normfree.spp(model, batch, **options)
    found = {finding.kind: finding.severity for finding in plot.findings}.get("single_value")
    assert found is None or plot.verdict != "healthy"
    return found


ONE = {
    "layers of vectors": (dense, torch.randn(1, 64)),
    "blocks of vectors": (lambda: nn.Sequential(*(Block() for _ in range(4))), torch.randn(1, 32)),
    "one layer": (lambda: dense(1), torch.randn(1, 64)),
    "maps pooled to one position": (lambda: pooled(6), torch.randn(1, 3, 16, 16)),
    "blocks of a class token": (lambda: Token(5), torch.randn(1, 9, 32)),
    "what is made of one vector": (generator, torch.randn(1, 16, 1, 1)),
}


@pytest.mark.parametrize("name", ONE)
def test_what_is_measured_over_one_value_is_an_error(name):
    made, batch = ONE[name]
    assert severity(made(), batch, gradient=False) == "error"
    with pytest.raises(AssertionError, match="one vector has no variance"):
        normfree.spp(made(), batch, gradient=False).assert_healthy()
    assert severity(made(), torch.cat([batch, torch.randn_like(batch)]), gradient=False) is None
    assert severity(made(), [batch, torch.randn_like(batch)], gradient=False) is None, "two batches of one"


def test_a_few_layers_of_one_value_are_a_warning_and_a_head_alone_is_nothing():
    image = torch.randn(1, 3, 16, 16)
    assert severity(pooled(3), image) == "warning"
    assert severity(pooled(1), image) is None
    assert severity(pooled(6, pool=False), image) is None


def test_the_example_that_was_called_healthy():
    found = normfree.spp(dense(), torch.randn(1, 64)).findings
    assert [(each.kind, each.severity) for each in found] == [("single_value", "error")]
    assert "2 or more examples" in found[0].remedy
    assert sum(each.severity == "error" for each in normfree.spp(dense(), torch.randn(2, 64)).findings) >= 3
