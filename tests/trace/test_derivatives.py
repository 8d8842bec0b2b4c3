"""Models whose forward differentiates: forces from an energy, Hamiltonian networks, gradient penalties."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from normfree import convert, spp


def energy(norm: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    hidden = [[nn.Linear(size, 32), *([nn.LayerNorm(32)] if norm else []), nn.SiLU()] for size in (6, 32)]
    return nn.Sequential(*hidden[0], *hidden[1], nn.Linear(32, 1))


class Forces(nn.Module):
    """The derivative of an energy, alone."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            return -torch.autograd.grad(self.net(x).sum(), x, create_graph=True)[0]


class Symplectic(Forces):
    """Positions and momenta that follow an energy, and a layer behind them."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.last = nn.Linear(6, 6)

    def forward(self, x):
        q, p = super().forward(x).chunk(2, dim=-1)
        return self.last(torch.cat([p, -q], dim=-1))


class Penalty(Forces):
    """The output beside the size of its own slope."""

    def forward(self, x):
        slope = super().forward(x)
        return self.net(x), slope.square().sum(1)


@pytest.mark.parametrize(
    ("model", "behind"), [(Forces, []), (Symplectic, ["last"]), (Penalty, ["net.0", "net.3", "net.6"])]
)
def test_operations_of_a_backward_pass_are_no_layers(model, behind):
    alone = ["net.0", "net.3", "net.6"]
    plot = spp(model(energy()), torch.randn(32, 6))
    assert [point.name.partition("#")[0] for point in plot.blocks] == alone + behind
    plot.assert_healthy()
    assert plot.configuration["gradient"] is True


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("model", [Forces, Symplectic, Penalty])
def test_conversion(model, norm):
    net, x = model(energy(norm)), torch.randn(32, 6)
    converted = convert(net, x)
    assert not converted.conversion.norms_left
    outputs = converted(x)
    total = sum(output.square().mean() for output in (outputs if isinstance(outputs, tuple) else (outputs,)))
    total.backward()
    gradients = {name: p.grad for name, p in converted.named_parameters() if p.grad is not None}
    assert any(name.startswith("net.0.") for name in gradients)
    assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_a_forward_that_differentiates_without_saying_so_is_told_how():
    class Silent(Forces):
        def forward(self, x):
            x = x.detach().requires_grad_(True)
            return -torch.autograd.grad(self.net(x).sum(), x)[0]

    with pytest.raises(ValueError, match="enable_grad"):
        spp(Silent(energy()), torch.randn(32, 6))
