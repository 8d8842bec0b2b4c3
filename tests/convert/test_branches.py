"""Which branches carry a factor, and which keep their size, with the reason in the notes."""

from __future__ import annotations

import torch
from convert.nets import normed
from torch import nn

import normfree

IMAGES = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """Two layers, one with a norm, joined with the stream by a function."""

    def __init__(self, forward):
        super().__init__()
        self.branch, self.plain = normed(8, 8), nn.Conv2d(8, 8, 1)
        self.gate, self.norm = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.joined = forward

    def forward(self, x):
        return self.joined(self, x)


def record_of(forward, *after):
    torch.manual_seed(0)
    return normfree.convert(nn.Sequential(normed(3, 8), Block(forward), *after), IMAGES).conversion


def carriers(record):
    return [change.name for change in record.changes if change.alpha is not None]


def test_a_branch_that_leads_back_to_its_shortcut_keeps_its_size():
    record = record_of(lambda m, x: x + (x + m.branch(x)))
    assert carriers(record) == ["1.branch.0"], "of the sum inside"
    assert record.notes == ("branch added in 1 keeps its size: it leads back to its own shortcut",)


def test_a_layer_that_is_gated_in_one_run_and_not_in_another_keeps_its_size():
    def twice(m, x):
        x = x + m.branch(x)
        gate = torch.sigmoid(m.gate(x.mean((2, 3), keepdim=True)))
        return x + m.branch(x) * gate

    record = record_of(twice)
    assert any("is read through gates and past them" in note for note in record.notes)


def test_a_norm_behind_a_stream_that_goes_on_belongs_to_no_branch():
    def preactivated(m, x):
        x = x + m.plain(torch.relu(x))
        return x + m.branch(torch.relu(m.norm(x)))

    record = record_of(preactivated)
    assert carriers(record) == ["1.branch.0"]


def test_a_norm_behind_a_sum_that_nothing_else_reads_belongs_to_its_branch():
    assert carriers(record_of(lambda m, x: m.norm(x + m.plain(torch.relu(x))))) == ["1.plain"]
