"""The gradient curve against autograd by hand: retain_grad at every point, the same projection."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from normfree.signal import spp


class Block(nn.Module):
    def __init__(self, channels: int, gain: float | None = None) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(channels, channels), nn.Linear(channels, channels)
        self.gain = None if gain is None else nn.Parameter(torch.tensor(gain, dtype=torch.float64))

    def forward(self, x):
        branch = self.last(torch.tanh(self.first(x)))
        return x + (branch if self.gain is None else self.gain * branch)


class Net(nn.Module):
    """A residual net; each sum may go through an in-place ReLU, which overwrites it."""

    def __init__(self, *, rectified: bool = False, gain: float | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(5, 6)
        self.blocks = nn.ModuleList(Block(6, gain) for _ in range(3))
        self.head = nn.Linear(6, 2)
        self.rectified = rectified
        self.double()

    def forward(self, x, kept: list | None = None):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
            if kept is not None:
                x.retain_grad()
                kept.append(x)
            if self.rectified:
                x = torch.relu(x) if kept is not None else torch.relu_(x)
        return self.head(x)


def batch() -> torch.Tensor:
    return torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def by_hand(model: nn.Module, x: torch.Tensor, seed: int) -> list[float]:
    kept: list[torch.Tensor] = []
    output = model(x, kept)
    projection = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed)).double()
    (output * projection).sum().backward()
    model.zero_grad()
    return [activation.grad.square().mean().item() for activation in kept]


def measured(model: nn.Module, **options) -> list[float]:
    return spp(model, batch(), gradient=True, **options).curve("avg_sq_gradient")[1:]


@pytest.mark.parametrize("rectified", [False, True], ids=["plain", "in-place relu after the sum"])
@pytest.mark.parametrize("seed", [0, 5])
def test_against_autograd(rectified, seed):
    model = Net(rectified=rectified)
    expected = by_hand(model, batch(), seed)
    assert measured(model, seed=seed) == pytest.approx(expected, rel=1e-12)
    assert len(set(expected)) == 3


@pytest.mark.parametrize("rectified", [False, True])
def test_frozen_parameters_change_nothing(rectified):
    model = Net(rectified=rectified)
    expected = by_hand(model, batch(), 0)
    model.requires_grad_(False)
    assert measured(model) == pytest.approx(expected, rel=1e-12)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_without_grad_mode_outside():
    model = Net()
    expected = by_hand(model, batch(), 0)
    with torch.no_grad():
        assert measured(model) == pytest.approx(expected, rel=1e-12)


def test_the_first_batch_alone_is_taken():
    model = Net()
    result = spp(model, [batch(), 100 * batch()], gradient=True)
    assert result.curve("avg_sq_gradient")[1:] == pytest.approx(by_hand(model, batch(), 0), rel=1e-12)


def test_the_gradient_flows_through_a_woken_gain():
    asleep, awake = Net(gain=0.0), Net(gain=1.0)
    expected = by_hand(awake, batch(), 0)
    assert measured(asleep) == pytest.approx(expected, rel=1e-12)
    # Left asleep, the gradient is the same at every point: shortcuts alone carry it.
    assert measured(asleep, wake=False) == pytest.approx([expected[-1]] * 3, rel=1e-12)
    assert measured(asleep) != pytest.approx([expected[-1]] * 3, rel=1e-3)


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (nn.Linear(5, 5) for _ in range(3))
        self.double()

    def forward(self, x, kept: list | None = None):
        for layer in (self.a, self.b, self.c):
            x = layer(x)
            if kept is not None:
                x.retain_grad()
                kept.append(x)
            x = torch.relu(x) if kept is not None else torch.relu_(x)
        return x


def test_a_point_per_layer():
    model = Layers()
    assert measured(model) == pytest.approx(by_hand(model, batch(), 0), rel=1e-12)


def test_dropout_drops_what_it_dropped_in_the_first_pass():
    class Dropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(5, 5)

        def forward(self, x):
            return nn.functional.dropout(x + self.layer(x), 0.5, self.training) * 2

    # Where the output is d·2·(x + f(x)) with d ∈ {0, 2}, the gradient at the sum is 4·r on what was kept.
    model, x = Dropped(), torch.randn(64, 5)
    gradient = spp(model, x, mode="train", gradient=True, seed=2).blocks[0].avg_sq_gradient
    torch.manual_seed(2)
    kept = nn.functional.dropout(torch.ones(64, 5), 0.5) > 0
    projection = torch.randn(64, 5, generator=torch.Generator().manual_seed(2))
    assert gradient == pytest.approx((4 * projection * kept).square().mean().item(), rel=1e-6)


def test_no_number_where_no_gradient_arrives():
    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 5)

        def forward(self, x):
            x = (x + self.a(x)).detach()
            return x + self.b(x)

    first, second = spp(Detached(), torch.randn(4, 5), gradient=True).curve("avg_sq_gradient")[1:]
    assert first is None
    assert second is not None


def test_no_curve_unless_asked():
    assert spp(Net(), batch()).curve("avg_sq_gradient") == [None] * 4


def test_another_way_on_the_second_run_is_refused():
    class Wanders(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 5)
            self.calls = iter(range(9))

        def forward(self, x):
            for _ in range(1 + next(self.calls)):
                x = x + self.layer(x)
            return x

    with pytest.raises(ValueError, match=r"took another way when it ran again \(1 points, then 2\)"):
        spp(Wanders(), torch.randn(4, 5), gradient=True)
