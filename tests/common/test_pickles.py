"""A file of torch.save is looked at before PyTorch builds what it says."""

import pickle
import zipfile
from collections import OrderedDict

import pytest
import torch
from torch import nn

from normfree.common.pickles import DEEPEST, check_torch_file


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize("old", [False, True])
def test_what_people_save_is_read(tmp_path, old):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    content = {
        "state_dict": OrderedDict(model.state_dict()),
        "optimizer": optimizer.state_dict(),
        "epoch": 3,
        "parameter": nn.Parameter(torch.zeros(2)),
        "random": torch.get_rng_state(),
        "sizes": [torch.Size((1, 2)), torch.float16, torch.device("cpu"), b"bytes", None, 1.5, (1, "a")],
    }
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=not old)
    check_torch_file(tmp_path / "w.pth")
    assert torch.load(tmp_path / "w.pth", weights_only=True)["epoch"] == 3


def test_what_is_called_is_named(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "w.pth")
    with pytest.raises(pickle.UnpicklingError, match=r"GLOBAL torch\.nn\.modules\.linear\.Linear"):
        check_torch_file(tmp_path / "w.pth")


def test_containers_are_bounded_in_depth_and_in_number(tmp_path):
    torch.save({"a": nested(DEEPEST - 3)}, tmp_path / "w.pth")
    check_torch_file(tmp_path / "w.pth")
    circle = []
    circle.append(circle)
    shared = [0] * 20
    for _ in range(8):
        shared = [shared] * 20
    for content in (nested(DEEPEST), circle, shared):
        torch.save({"a": content}, tmp_path / "w.pth")
        with pytest.raises(ValueError, match="containers"):
            check_torch_file(tmp_path / "w.pth")


def test_numbers_are_as_large_as_the_file(tmp_path):
    torch.save({"a": torch.zeros(1000)}, tmp_path / "w.pth")
    with (
        zipfile.ZipFile(tmp_path / "w.pth") as whole,
        zipfile.ZipFile(tmp_path / "c.pth", "w", zipfile.ZIP_DEFLATED) as compressed,
    ):
        for name in whole.namelist():
            compressed.writestr(name, whole.read(name))
    with pytest.raises(ValueError, match="compressed"):
        check_torch_file(tmp_path / "c.pth")
