"""A file of torch.save is looked at before PyTorch builds what it says."""

import codecs
import io
import pickle
import tarfile
import zipfile
from collections import Counter, OrderedDict

import pytest
import torch
from torch import nn

from normfree.common.pickles import DEEPEST, MOST_LARGE_KEYS, SMALL_KEY, check_torch_file


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


CALLS = b"\x80\x02cos\nsystem\nX\x00\x00\x00\x00\x85R."
"""A pickle that is refused as soon as it is looked at."""


def archive(path, **pickles):
    with zipfile.ZipFile(path, "w") as file:
        for name, content in {"version": b"3\n", "byteorder": b"little", **pickles}.items():
            file.writestr(f"archive/{name}", content)
    return path


def test_the_pickle_that_pytorch_reads_is_the_one_that_is_checked(tmp_path):
    harmless = pickle.dumps({}, 2)
    with pytest.raises(pickle.UnpicklingError, match=r"GLOBAL os\.system"):
        check_torch_file(archive(tmp_path / "capitals.pth", **{"DATA.PKL": CALLS}))
    with pytest.raises(ValueError, match="differ in nothing but case"):
        check_torch_file(archive(tmp_path / "two.pth", **{"data.pkl": harmless, "DATA.pkl": CALLS}))
    torch.save({}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    old = (tmp_path / "old.pth").read_bytes().replace(harmless, CALLS, 1)
    sound = archive(tmp_path / "sound.pth", **{"data.pkl": harmless}).read_bytes()
    (tmp_path / "both.pth").write_bytes(old + sound)
    with pytest.raises(pickle.UnpicklingError, match=r"GLOBAL os\.system"):
        check_torch_file(tmp_path / "both.pth")


def test_a_tar_that_begins_like_a_pickle_is_not_opened(tmp_path):
    torch.save({}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    with tarfile.open(tmp_path / "t.pth", "w", format=tarfile.USTAR_FORMAT) as file:
        file.addfile(tarfile.TarInfo("\x80\x02"), io.BytesIO())
    with pytest.raises(ValueError, match="tar archive"):
        check_torch_file(tmp_path / "t.pth")


def test_large_numbers_as_keys_are_bounded(tmp_path):
    """An old optimizer has one for each parameter; many can be chosen so that a dict takes long."""
    torch.save({"state": {SMALL_KEY + i: i for i in range(MOST_LARGE_KEYS)}}, tmp_path / "w.pth")
    check_torch_file(tmp_path / "w.pth")
    torch.save(dict.fromkeys(range(3 * MOST_LARGE_KEYS), 0), tmp_path / "w.pth")
    check_torch_file(tmp_path / "w.pth")
    for key in (lambda i: i * (2**61 - 1), lambda i: 0.5 + i):
        torch.save([{key(i + j): 0 for i in range(1, MOST_LARGE_KEYS)} for j in (0, 1)], tmp_path / "w.pth")
        with pytest.raises(ValueError, match="10,000 large numbers as keys"):
            check_torch_file(tmp_path / "w.pth")


def test_what_is_in_a_set_is_looked_at_before_it_is_hashed(tmp_path):
    for content in (b"\x80\x04\x8f(K\x01)\x90.", b"\x80\x04(K\x01)\x91."):
        with pytest.raises(ValueError, match="key of type tuple"):
            check_torch_file(archive(tmp_path / "w.pth", **{"data.pkl": content}))


def colliding(count):
    return [i * (2**61 - 1) for i in range(1, count)]


def test_what_makes_a_container_at_once_is_looked_at_first(tmp_path):
    """An OrderedDict of pairs, as Python 2 wrote it, is read; its keys are bounded as those of a dict are."""

    class Pairs:
        def __init__(self, kind, items):
            self.made = kind, (items,)

        def __reduce__(self):
            return self.made

    torch.save({"old": Pairs(OrderedDict, [["a", 1], ["b", 2]]), "new": Counter("aab")}, tmp_path / "w.pth")
    check_torch_file(tmp_path / "w.pth")
    assert torch.load(tmp_path / "w.pth", weights_only=True)["old"] == {"a": 1, "b": 2}
    for made, rule in (
        (Pairs(OrderedDict, [[key, 0] for key in colliding(MOST_LARGE_KEYS + 2)]), "large numbers as keys"),
        (Pairs(Counter, colliding(9)), "makes collections.Counter of no container"),
        (Pairs(codecs.encode, "x" * 9), "otherwise than bytes are written"),
    ):
        torch.save(made, tmp_path / "w.pth")
        with pytest.raises(ValueError, match=rule):
            check_torch_file(tmp_path / "w.pth")


def test_a_tensor_is_made_by_what_makes_tensors_and_no_items_of_it_are_set(tmp_path):
    for content in (
        b"ctorch._tensor\n_rebuild_from_type_v2\n(c__builtin__\nbytearray\nctorch\nTensor\nK\x01\x85NtR.",
        b"ctorch._tensor\n_rebuild_from_type_v2\n(ctorch._tensor\n_rebuild_from_type_v2\nctorch\nTensor\n)NtR.",
    ):
        with pytest.raises(ValueError, match="makes a tensor by what makes none"):
            check_torch_file(archive(tmp_path / "w.pth", **{"data.pkl": b"\x80\x02" + content}))
    with pytest.raises(TypeError, match="item assignment"):
        check_torch_file(archive(tmp_path / "w.pth", **{"data.pkl": b"\x80\x02ctorch\nSize\n)RK\x00K\x00s."}))
