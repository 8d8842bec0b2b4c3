"""A module that the example gives no row to is as one that did not run: it stays, and the record says so."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import normfree
from normfree.convert.pipeline import NO_ROWS


class Product(nn.Module):
    """A layer that is none of torch's."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.kernel, self.bias = nn.Parameter(torch.randn(width, 32)), nn.Parameter(torch.zeros(32))

    def forward(self, x):
        return x @ self.kernel + self.bias


class ByKind(nn.Module):
    """Rows that are encoded by their kind."""

    def __init__(self, made) -> None:
        super().__init__()
        self.encoders, self.last = nn.ModuleList(made() for _ in range(3)), nn.Linear(32, 4)

    def forward(self, x, kind):
        h = x.new_zeros(len(x), 32)
        for number, encoder in enumerate(self.encoders):
            h[kind == number] = encoder(x[kind == number])
        return self.last(h)


class Weighted(ByKind):
    """Experts, whose results are scaled and added up."""

    def forward(self, x, kind):
        made = [encoder(x[kind == number]) for number, encoder in enumerate(self.encoders)]
        rows = [torch.where(kind == number)[0] for number in range(3)]
        h = x.new_zeros(len(x), 32)
        for row, one in zip(rows, made, strict=True):
            h = h.index_add(0, row, 0.5 * one)
        return self.last(h)


class Domains(ByKind):
    """One layer, and a norm for each kind."""

    def __init__(self) -> None:
        super().__init__(lambda: nn.Sequential(nn.BatchNorm1d(32), nn.ReLU()))
        self.first = nn.Linear(8, 32)

    def forward(self, x, kind):
        return super().forward(self.first(x), kind)


class Twice(nn.Module):
    """One encoder that is given the rows of each kind, of the first of which there may be none."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.last = encoder(), nn.Linear(32, 4)

    def forward(self, x, kind):
        h = x.new_zeros(len(x), 32)
        for number in (2, 0, 1):
            h[kind == number] = self.encoder(x[kind == number])
        return self.last(h)


class Maps(ByKind):
    def __init__(self) -> None:
        super().__init__(lambda: nn.Sequential(nn.Conv2d(8, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()))
        self.last = nn.Conv2d(32, 4, 1)

    def forward(self, x, kind):
        x = x[:, :, None, None] * torch.linspace(-1, 1, 6)[:, None]
        h = x.new_zeros(len(x), 32, 6, 6)
        for number, encoder in enumerate(self.encoders):
            h[kind == number] = encoder(x.expand(-1, -1, 6, 6)[kind == number])
        return self.last(h)


def encoder(layer=lambda: nn.Linear(8, 32)) -> nn.Module:
    return nn.Sequential(layer(), nn.BatchNorm1d(32), nn.ReLU())


NETS = {
    "encoders": lambda: ByKind(encoder),
    "encoders of a class of their own": lambda: ByKind(lambda: encoder(Product)),
    "experts": lambda: Weighted(encoder),
    "norms of domains": Domains,
    "maps": Maps,
}


def given(kinds: int) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(kinds)
    return torch.randn(96, 8, generator=random), torch.randint(0, kinds, (96,), generator=random)


def trained(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for norm in model.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
            nn.init.uniform_(norm.weight, 0.5, 2)
            nn.init.normal_(norm.bias)
    return model.eval()


@pytest.mark.parametrize("name", NETS)
def test_the_function_is_kept_where_the_example_gives_no_row(name: str) -> None:
    model = trained(NETS[name]())
    converted = normfree.convert(model, given(2), start="pretrained")
    left = {kept.name: kept.reason for kept in converted.conversion.norms_left}
    norm = "encoders.2.0" if name == "norms of domains" else "encoders.2.1"
    assert left == {norm: NO_ROWS}
    for kinds in (2, 3):
        torch.testing.assert_close(converted(*given(kinds)), model(*given(kinds)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NETS)
def test_a_fresh_start_leaves_what_has_no_row_and_converts_the_rest(name: str) -> None:
    torch.manual_seed(0)
    model = NETS[name]()
    converted = normfree.convert(model, given(2))
    assert [kept.reason for kept in converted.conversion.norms_left] == [NO_ROWS]
    for own in dict(model.encoders[2].named_parameters()):
        assert torch.equal(converted.encoders[2].get_parameter(own), model.encoders[2].get_parameter(own))
    assert converted(*given(3)).isfinite().all()
    normfree.spp(converted, given(2)).assert_healthy()


@pytest.mark.parametrize("start", ["fresh", "pretrained"])
def test_a_first_run_on_no_rows_is_none(start) -> None:
    model = trained(Twice())
    converted = normfree.convert(model, given(2), start=start)
    assert converted.conversion.norms_left == () and converted.conversion.notes == ()
    if start == "pretrained":
        torch.testing.assert_close(converted(*given(3)), model(*given(3)), rtol=1e-4, atol=1e-4)


def test_layers_without_norms_that_have_no_row_stay_and_are_told() -> None:
    torch.manual_seed(0)
    model = ByKind(lambda: nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32)))
    converted = normfree.convert(model, given(2))
    told = {kept.name for kept in converted.conversion.kept if kept.reason == NO_ROWS}
    assert told == {"encoders.2.0", "encoders.2.2"}
    assert torch.equal(converted.encoders[2][0].weight, model.encoders[2][0].weight)
