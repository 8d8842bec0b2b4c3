"""Less common forms: one-dimensional convolutions, subtraction and interpolation as additions, recurrences."""

import pytest
import torch
from torch import Tensor, nn

from normfree.signal import spp

OFFSET = torch.tensor([5.0, -5.0, 0.0]).view(1, 3, 1)


class Combined(nn.Module):
    """A convolution combined with its input in a way of one's own."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.conv = nn.Conv1d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        f = self.conv(x)
        if self.way == "input less branch":
            return x - f
        if self.way == "branch less input":
            return f - x
        return torch.lerp(x, f, 0.25)


@pytest.mark.parametrize("way", ["input less branch", "interpolation"])
def test_a_difference_and_an_interpolation_are_residual(way):
    torch.manual_seed(0)
    model, x = Combined(way), torch.randn(4, 3, 50)
    (block,) = spp(model, x).blocks
    branch = model.conv(x).detach().double()
    assert block.kind == "residual"
    assert block.residual_avg_channel_var == pytest.approx(branch.var((0, 2), correction=0).mean().item(), rel=1e-5)
    out = model(x).detach().double()
    assert block.avg_channel_var == pytest.approx(out.var((0, 2), correction=0).mean().item(), rel=1e-5)


def test_what_is_left_of_a_branch_without_its_input_is_not_residual():
    assert [block.kind for block in spp(Combined("branch less input"), torch.randn(4, 3, 50)).blocks] == ["layer"]


@pytest.mark.parametrize("model", [Combined("input less branch"), nn.Sequential(nn.Conv1d(3, 8, 3), nn.ReLU())])
def test_the_entry_of_a_sequence_model_is_measured_over_channels(model):
    x = torch.randn(8, 3, 50) + OFFSET
    entry = spp(model, x).entry
    assert entry.channel_axis == 1
    assert entry.avg_channel_var == pytest.approx(x.double().var((0, 2), correction=0).mean().item(), rel=1e-5)
    assert entry.avg_channel_sq_mean == pytest.approx(x.double().mean((0, 2)).square().mean().item(), rel=1e-5)


def test_a_recurrent_layer_is_a_point():
    points = spp(nn.LSTM(6, 5, batch_first=True), torch.randn(4, 7, 6)).blocks
    assert points
    assert all(point.kind == "layer" for point in points)


def test_a_generator_kept_by_a_module_stands_where_it_stood():
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.generator = torch.Generator().manual_seed(3)
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x + torch.randn(x.shape, generator=self.generator))

    model = Noisy()
    before = model.generator.get_state()
    spp(model, torch.randn(4, 4))
    assert torch.equal(model.generator.get_state(), before)
