"""In the measuring mode whatever normalizes by statistics that it keeps takes those of the batch, under any names."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normfree

LAYERS, WIDTH = 10, 16


class Named(nn.Module):
    """A batch norm whose buffers have names of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.mu: Tensor
        self.var: Tensor
        self.register_buffer("mu", torch.zeros(WIDTH))
        self.register_buffer("var", torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.mu, self.var, training=self.training)


class Written(Named):
    """One that computes its statistics itself, in a method of its own."""

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if not self.training:
            return self.mu, self.var
        self.mu.lerp_(x.detach().mean((0, 2, 3)), 0.1)
        self.var.lerp_(x.detach().var((0, 2, 3)), 0.1)
        return x.mean((0, 2, 3)), x.var((0, 2, 3))

    def forward(self, x: Tensor) -> Tensor:
        mean, variance = self.statistics(x)
        return (x - mean[:, None, None]) * torch.rsqrt(variance + 1e-5)[:, None, None]


def convolutions() -> list[nn.Conv2d]:
    torch.manual_seed(0)
    return [nn.Conv2d(3 if i == 0 else WIDTH, WIDTH, 3, padding=1) for i in range(LAYERS)]


def chain(norm: Callable[[], nn.Module]) -> nn.Sequential:
    return nn.Sequential(*(part for layer in convolutions() for part in (layer, norm(), nn.ReLU(), nn.Dropout(0.5))))


class Inside(nn.Module):
    """The norms are calls in the model's own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.drop = nn.ModuleList(convolutions()), nn.Dropout(0.5)
        for number in range(LAYERS):
            self.register_buffer(f"mean{number}", torch.zeros(WIDTH))
            self.register_buffer(f"variance{number}", torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        for number, layer in enumerate(self.layers):
            mean, variance = self.get_buffer(f"mean{number}"), self.get_buffer(f"variance{number}")
            x = self.drop(F.batch_norm(layer(x), mean, variance, training=self.training).relu())
        return x


MODELS: dict[str, Callable[[], nn.Module]] = {
    "named": lambda: chain(Named),
    "written": lambda: chain(Written),
    "in the model's forward": Inside,
}


@pytest.mark.parametrize("name", MODELS)
def test_it_is_measured_as_torchs_own_is(name: str) -> None:
    x = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    expected = normfree.spp(chain(lambda: nn.BatchNorm2d(WIDTH)), x)
    model = MODELS[name]()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = normfree.spp(model, x)
    assert found.curve("avg_channel_var") == pytest.approx(expected.curve("avg_channel_var"), rel=1e-3)
    assert found.curve("avg_sq_gradient")[1:] == pytest.approx(expected.curve("avg_sq_gradient")[1:], rel=0.01)
    found.assert_healthy()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_module_with_one_buffer_or_none_that_asks_keeps_its_mode() -> None:
    class Noise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return x + 100 * torch.randn_like(x) if self.training else x

    model = nn.Sequential(nn.Linear(4, 4), Noise(), nn.Linear(4, 4))
    assert normfree.spp(model, torch.randn(64, 4)).blocks[-1].avg_channel_var < 10
