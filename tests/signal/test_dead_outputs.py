"""An output that is the same for every input, and of which no gradient arrives anywhere: the loss does not move."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from normfree.signal import spp

X = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))


class Does(nn.Module):
    def __init__(self, operation) -> None:
        super().__init__()
        self.operation = operation

    def forward(self, x):
        return self.operation(x)


class Gain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return self.gain * x


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 2)
        nn.init.constant_(self.head.bias, -9.0)

    def forward(self, x):
        x = x + self.first(x).relu()
        x = x + self.second(x).relu()
        return self.head(x).relu()


class Checkpointed(nn.Module):
    """Whose gradients a whole backward pass alone gives."""

    def __init__(self) -> None:
        super().__init__()
        self.body = chain(nn.ReLU(), bias=-9.0)

    def forward(self, x):
        return checkpoint(self.body, x, use_reentrant=True)


class Shared(nn.Module):
    """One module for all its activations."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.activation = nn.Linear(16, 32), nn.Linear(32, 1), nn.ReLU()
        nn.init.constant_(self.last.bias, -9.0)

    def forward(self, x):
        return self.activation(self.last(self.activation(self.first(x))))


def chain(*last, bias=0.0, outputs=1) -> nn.Sequential:
    body = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, outputs), *last)
    nn.init.constant_(body[4].bias, bias)
    return body


def with_zero_head(*last) -> nn.Sequential:
    body = chain(*last)
    nn.init.zeros_(body[4].weight)
    return body


def found(model):
    return {finding.kind: finding for finding in spp(model, X).findings}.get("dead_channels")


# what acts last, what it is called, and whether there is a module that can be left out
DEAD = {
    "ReLU": (lambda: chain(nn.ReLU(), bias=-9.0), "ReLU", True),
    "ReLU of several outputs": (lambda: chain(nn.ReLU(), bias=-9.0, outputs=3), "ReLU", True),
    "ReLU6, beyond 6": (lambda: chain(nn.ReLU6(), bias=9.0), "hard tanh", True),
    "hard tanh": (lambda: chain(nn.Hardtanh(0.0, 1.0), bias=-9.0), "hard tanh", True),
    "threshold": (lambda: chain(nn.Threshold(0.0, 0.0), bias=-9.0), "threshold", True),
    "saturated sigmoid": (lambda: chain(nn.Sigmoid(), bias=-300.0), "sigmoid", True),
    "softmax of one class": (lambda: chain(nn.Softmax(1)), "softmax", True),
    "clamp in the forward": (lambda: chain(Does(lambda x: x.clamp(min=0)), bias=-9.0), "clamp", False),
    "ReLU, flattened": (lambda: chain(nn.ReLU(), nn.Flatten(0), bias=-9.0), "ReLU", True),
    "ReLU, times a number": (lambda: chain(nn.ReLU(), Does(lambda x: 3 * x), bias=-9.0), "ReLU", True),
    "ReLU of a module with others": (Shared, "ReLU", False),
    "behind blocks": (Residual, "ReLU", False),
    "behind a checkpoint": (Checkpointed, "ReLU", True),
    "a factor of zero": (lambda: chain(Does(lambda x: 0 * x)), "", False),
    "two outputs": (lambda: chain(Does(lambda x: (x.relu(), x.relu().argmax(1))), bias=-9.0), "", False),
}

# what learns, or varies
ALIVE = {
    "ReLU": lambda: chain(nn.ReLU(), bias=9.0),
    "LeakyReLU": lambda: chain(nn.LeakyReLU(), bias=-9.0),
    "Softplus": lambda: chain(nn.Softplus(), bias=-9.0),
    "a head of zeros": with_zero_head,
    "a head of zeros before a sigmoid": lambda: with_zero_head(nn.Sigmoid()),
    "a gain of zero": lambda: chain(Gain()),
    "an argmax": lambda: chain(Does(lambda x: x.argmax(1)), outputs=3),
    "a sign": lambda: chain(Does(torch.sign)),
    "an estimate of the gradient": lambda: chain(Does(lambda x: x + (x.relu() - x).detach()), bias=-9.0),
    "a detached body": lambda: nn.Sequential(nn.Linear(16, 32), nn.ReLU(), Does(torch.detach), nn.Linear(32, 1)),
    "an output beside it": lambda: chain(Does(lambda x: (x.relu(), x)), bias=-9.0),
}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("name", DEAD)
def test_an_output_that_nothing_moves_is_an_error(name):
    torch.manual_seed(0)
    build, activation, replaced = DEAD[name]
    finding = found(build())
    assert finding.severity == "error" and finding.block is None
    assert "the model's output is the same for every input" in finding.message
    assert (f"its last {activation} is dead" if activation else "what acts on it last is dead") in finding.message
    assert f"Leave out the last {activation}" in finding.remedy if activation else not finding.code
    assert bool(finding.code) == replaced


@pytest.mark.parametrize("name", ALIVE)
def test_what_learns_or_varies_has_no_dead_output(name):
    torch.manual_seed(0)
    assert found(ALIVE[name]()) is None


def test_one_example_cannot_tell():
    torch.manual_seed(0)
    findings = spp(chain(nn.ReLU(), bias=-9.0), X[:1]).findings
    assert "dead_channels" not in {finding.kind for finding in findings}


def test_at_torch_s_initialisation_it_is_said_where_the_loss_does_not_move():
    """A last ReLU is dead for all examples at one seed of four."""
    dead = []
    for seed in range(16):
        torch.manual_seed(seed)
        layers = [part for _ in range(3) for part in (nn.Linear(16 if not _ else 32, 32), nn.ReLU())]
        model = nn.Sequential(*layers, nn.Linear(32, 1), nn.ReLU())
        (model(X) - 1).square().sum().backward()
        dead.append(not any(parameter.grad.any() for parameter in model.parameters()))
        assert (found(model) is not None) == dead[-1]
    assert 0 < sum(dead) < len(dead)


def test_a_curve_of_zeros_is_drawn(tmp_path):
    torch.manual_seed(0)
    plot = spp(chain(nn.ReLU(), bias=-9.0), X)
    assert plot.curve("avg_sq_gradient")[1:] == [0.0, 0.0, 0.0] and plot.configuration["gradient"] is True
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot.plot(tmp_path / "plot.png")
        plot.to_html(tmp_path / "page.html")
