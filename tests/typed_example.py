"""What type checkers make of the public interface; pyright reads this file in `make lint`, a test runs it.

Every line that pyright has to refuse says so, and it refuses the remark where there is nothing to remark on.
"""

# pyright: strict, reportUnnecessaryTypeIgnoreComment=true

from pathlib import Path
from typing import assert_type

import torch
from torch import nn

import normfree
from normfree.convert import Converted
from normfree.data import DataConfig
from normfree.export import Exported
from normfree.models import Backbone
from normfree.signal import Mode, SignalPropagation
from normfree.train import TrainConfig


class Net(nn.Sequential):
    """A network of one's own."""

    def head(self) -> nn.Module:
        """Its last layer."""
        return self[-1]


def use(folder: Path) -> None:
    """Call what a reader of the documentation would."""
    x = torch.randn(2, 3, 4, 4)
    net = Net(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))

    mode: Mode = "eval"
    plot = assert_type(normfree.spp(net, x, mode=mode, points="layers"), SignalPropagation)
    assert_type(plot.curve("avg_channel_var"), list[float | None])
    assert [finding for finding in plot.findings if finding.kind == "explosion"] == []

    converted = assert_type(normfree.convert(net, x, start="pretrained"), Converted)
    assert_type(normfree.convert(net, x).conversion.to_json(folder / "record.json"), Path)
    module: nn.Module = converted
    assert isinstance(module, Converted) and not isinstance(net, Converted)
    assert_type(module.conversion.summary(), str)

    assert_type(normfree.fold(net), Net)
    assert_type(normfree.fold(net).head(), nn.Module)
    assert_type(normfree.fold(converted).conversion.summary(), str)
    assert_type(normfree.fold(normfree.nn.ScaledWSConv2d(4, 4, 1)), nn.Module)

    model = normfree.create_model("resnetv2_50", norm="group", order="act-norm", width=0.5, depths=(1, 1, 1, 1))
    assert_type(model, Backbone)
    assert_type(normfree.export.to_program(model, torch.randn(1, 3, 32, 32), folder / "model.pt2"), Exported)
    data = assert_type(normfree.data.DataConfig(in_channels=1), DataConfig)
    assert_type(normfree.train.TrainConfig(name="run", model="nf_resnet50", data=data), TrainConfig)


def misuse() -> None:
    """Call what is refused, by the type checker as by the function."""
    net, x = nn.Linear(2, 2), torch.randn(2, 2)
    normfree.spp(net, x, mode="evaluation")  # pyright: ignore[reportArgumentType]
    normfree.spp(net, x).curve("variance")  # pyright: ignore[reportArgumentType]
    normfree.convert(net, x, start="trained")  # pyright: ignore[reportArgumentType]
    normfree.create_model("resnetv2_50", norm="bach")  # pyright: ignore[reportArgumentType]
    normfree.create_model("resnetv2_50", wdith=2)  # pyright: ignore[reportCallIssue]
    normfree.gamma("rleu")  # pyright: ignore[reportArgumentType]
