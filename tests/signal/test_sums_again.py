"""Two activations added once more are one sum: one block, measured once, whose gradient is that of all copies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from normfree.signal import spp
from normfree.signal.points import PointRecorder
from normfree.trace.inputs import ModuleStack


class Dense(nn.Module):
    """Every layer reads the sum of all before it: added up anew, or kept."""

    def __init__(self, layers: int, *, anew: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(layers))
        self.anew = anew

    def forward(self, x: Tensor) -> Tensor:
        outs, total = [x], x
        for layer in self.layers:
            total = self.add(outs) if self.anew else total if len(outs) == 1 else total + outs[-1]
            outs.append(layer(total).relu())
        return outs[-1]

    def add(self, outs: list[Tensor]) -> Tensor:
        return sum(outs[1:], outs[0])


class Checkpointed(Dense):
    """The layers run a second time in the backward pass."""

    def __init__(self, layers: int, *, anew: bool, reentrant: bool) -> None:
        super().__init__(layers, anew=anew)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Any:
        return checkpoint(super().forward, x, use_reentrant=self.reentrant)


def batch() -> Tensor:
    return torch.randn(32, 16, generator=torch.Generator().manual_seed(1))


def curves(model: nn.Module, **options: Any) -> list[tuple[Any, ...]]:
    blocks = spp(model, batch(), **options).blocks
    return [
        (
            block.avg_channel_sq_mean,
            block.avg_channel_var,
            block.residual_avg_channel_var or 0.0,
            block.avg_sq_gradient,
        )
        for block in blocks
    ]


@pytest.mark.parametrize("points", ["residual", "layers"])
def test_sums_added_up_anew_are_those_that_are_kept(points: str) -> None:
    anew, kept = (curves(Dense(12, anew=anew), points=points) for anew in (True, False))
    assert len(anew) == len(kept) == (11 if points == "residual" else 12)
    for one, other in zip(anew, kept, strict=True):
        assert one == pytest.approx(other, rel=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
def test_so_they_are_in_what_runs_again(reentrant: bool) -> None:
    anew = curves(Checkpointed(6, anew=True, reentrant=reentrant))
    kept = curves(Dense(6, anew=False))
    assert len(anew) == 5
    for one, other in zip(anew, kept, strict=True):
        assert one == pytest.approx(other, rel=1e-5)


WRITES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "itself": lambda branch, whole: branch.mul_(3),
    "a view of it": lambda branch, whole: branch[:, :8].mul_(3),
    "what it is a view of": lambda branch, whole: whole.mul_(3),
}


class Written(nn.Module):
    """The same two tensors are added twice, and one is written to between."""

    def __init__(self, write: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.write, self.sums = write, list[Tensor]()
        self.first, self.second = nn.Linear(16, 32), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        whole = self.first(x)
        branch = whole[:, 8:24]
        before = x + branch
        middle = self.second(before.relu())
        self.write(branch, whole)
        after = x + branch
        self.sums = [before.detach(), after.detach()]
        return middle + after


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_what_was_written_to_is_another_sum(write: Callable[[Tensor, Tensor], Any]) -> None:
    model = Written(write)
    blocks = spp(model, batch(), gradient=False).blocks
    with torch.no_grad():
        model(batch())
    before, after = (float(each.var(0, unbiased=False).mean()) for each in model.sums)
    assert after > 1.3 * before
    assert [block.avg_channel_var for block in blocks[:2]] == pytest.approx([before, after], rel=1e-5)


def test_a_difference_and_another_order_are_sums_of_their_own() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            branch = self.first(x)
            return self.second(x + branch) + (x - branch) + torch.add(x, branch, alpha=0.5)

    variances = [block.avg_channel_var for block in spp(Two(), batch(), gradient=False).blocks]
    assert len(variances) == len(set(variances)) >= 4


def recorded(layers: int) -> int:
    """How many activations are recorded of one pass."""
    model, x = Dense(layers, anew=True), batch()
    stack = ModuleStack(model)
    recorder = PointRecorder(
        model, [x], stack=stack, before_writing=lambda _: None, examples=32, points="residual", earlier=None
    )
    with torch.no_grad(), stack.follow_modules(), recorder:
        model(x)
    return recorder.created


def test_what_is_recorded_grows_with_the_layers_and_not_with_the_additions() -> None:
    assert recorded(40) - recorded(20) == 2 * (recorded(20) - recorded(10))
