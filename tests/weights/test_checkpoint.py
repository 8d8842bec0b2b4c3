"""A saved model comes back as it was, and nothing else is mistaken for one."""

import argparse
import json
import struct
from collections import Counter

import pytest
import torch
from safetensors.torch import save_file

import normfree
from normfree.weights.checkpoint import load_stored, read_state_dict

OVERRIDES = {"num_classes": 7, "width": 1, "activation": "silu", "depths": (1, 1, 1, 1), "padding": "same"}


@pytest.mark.parametrize("name", ["nf_resnet50", "resnetv2_50", "fixup_resnet50"])
def test_rebuilds_the_model_with_its_weights_and_statistics(name, tmp_path):
    overrides = {k: v for k, v in OVERRIDES.items() if name == "nf_resnet50" or k not in ("activation",)}
    model = normfree.create_model(name, **overrides)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.copy_(torch.rand_like(tensor.double()).to(tensor.dtype))
    path = normfree.save(model, tmp_path / "deep" / "m.safetensors")
    again = normfree.load(path)
    assert again.config == model.config | {"depths": list(overrides["depths"])}
    assert not again.training
    state = again.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    assert [file.name for file in path.parent.iterdir()] == ["m.safetensors"]


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    model = normfree.create_model("nf_resnet50", **OVERRIDES)
    path = normfree.save(model, tmp_path / "m.safetensors")
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        normfree.save(normfree.create_model("nf_resnet50", **OVERRIDES), path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["m.safetensors"]


def test_what_is_none_of_ours_is_refused(tmp_path):
    with pytest.raises(ValueError, match="create_model"):
        normfree.save(torch.nn.Linear(2, 2), tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="no file"):
        normfree.load(tmp_path / "none.safetensors")
    foreign = tmp_path / "foreign.safetensors"
    save_file({"a": torch.zeros(2)}, foreign)
    with pytest.raises(ValueError, match="not the model"):
        normfree.load(foreign)
    unknown = tmp_path / "unknown.safetensors"
    save_file({"a": torch.zeros(2)}, unknown, metadata={"normfree": json.dumps({"name": "resnet7"})})
    with pytest.raises(ValueError, match="resnet7"):
        normfree.load(unknown)
    misfit = tmp_path / "misfit.safetensors"
    save_file({"a": torch.zeros(2)}, misfit, metadata={"normfree": json.dumps({"name": "nf_resnet50"})})
    with pytest.raises(ValueError, match="does not describe"):
        normfree.load(misfit)


@pytest.mark.parametrize("damage", [b"", b"\x00" * 7, struct.pack("<Q", 1 << 60) + b"{}", b"pickle"])
def test_a_damaged_file_is_refused(damage, tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(damage)
    with pytest.raises(ValueError, match="no sound safetensors file"):
        normfree.load(path)


def test_a_truncated_file_is_refused(tmp_path):
    path = normfree.save(normfree.create_model("nf_resnet50", **OVERRIDES), tmp_path / "m.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="no sound safetensors file"):
        normfree.load(path)


def test_a_model_with_an_exchanged_layer_is_refused_when_saved_not_when_loaded(tmp_path):
    model = normfree.create_model("nf_resnet50", **OVERRIDES)
    model.classifier = torch.nn.Linear(512, 3)
    with pytest.raises(ValueError, match=r"2 tensors \(classifier\.bias, classifier\.weight\)"):
        normfree.save(model, tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())


def test_precision_is_kept(tmp_path):
    model = normfree.create_model("nf_resnet50", **OVERRIDES).bfloat16()
    again = normfree.load(normfree.save(model, tmp_path / "m.safetensors"))
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}


def test_every_tensor_keeps_its_own_precision(tmp_path):
    model = normfree.create_model("resnetv2_50", num_classes=7, width=1, depths=(1, 1, 1, 1)).bfloat16()
    model.classifier.float()
    again = normfree.load(normfree.save(model, tmp_path / "m.safetensors"))
    precisions = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    assert {name: tensor.dtype for name, tensor in again.state_dict().items()} == precisions
    assert {torch.bfloat16, torch.float32, torch.int64} == set(precisions.values())
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_there_is_one_save_and_one_load():
    from normfree import weights

    assert (normfree.save, normfree.load) == (weights.save, weights.load)


def test_what_is_no_place_for_a_file_of_weights(tmp_path):
    model = normfree.create_model("nf_resnet50", **OVERRIDES)
    places = {
        tmp_path: r"is a folder; name the file, such as '.*model\.safetensors'$",
        tmp_path / "m.pt": r"must end in \.safetensors, for no other form is written; pass '.*m\.safetensors'$",
        None: r"^path='NoneType': must be a path; pass one such as 'model\.safetensors'$",
    }
    for place, message in places.items():
        with pytest.raises(ValueError, match=message) as caught:
            normfree.save(model, place)
        assert str(caught.value).startswith("path=")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"^path='.*': is a folder; .* normfree\.from_pretrained$"):
        normfree.load(tmp_path)
    with pytest.raises(ValueError, match=r"^model='Sequential': was not built .*; pass the one inside it, model\.0$"):
        normfree.save(torch.nn.Sequential(model), tmp_path / "m.safetensors")


def test_more_metadata_are_kept_and_the_bytes_are_the_same_each_time(tmp_path):
    from safetensors import safe_open

    model = normfree.create_model("nf_resnet50", **OVERRIDES)
    more = {f"name {number}": f"text {number}" for number in range(9)}
    paths = [normfree.save(model, tmp_path / f"{number}.safetensors", metadata=more) for number in range(3)]
    assert len({path.read_bytes() for path in paths}) == 1
    with safe_open(paths[0], framework="pt") as file:
        assert file.metadata().items() >= more.items()
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(normfree.load(paths[0])(x), model.eval()(x))
    for wrong in ({"classes": ["a", "b"]}, {1: "one"}):
        with pytest.raises(ValueError, match=r"^metadata=.*must be text by name; write other values as JSON"):
            normfree.save(model, tmp_path / "wrong.safetensors", metadata=wrong)
    assert not (tmp_path / "wrong.safetensors").exists()


def test_two_values_of_a_tied_weight_are_refused(tmp_path):
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
            self.second.weight = self.first.weight

    torch.manual_seed(0)
    model, path = Tied(), tmp_path / "w.pth"
    torch.save(model.state_dict(), path)
    load_stored(Tied(), read_state_dict(path))
    torch.save({**model.state_dict(), "second.weight": model.first.weight.detach() + 1}, path)
    with pytest.raises(
        ValueError, match=r"w\.pth'.* two values of one weight of the model, first\.weight and second\."
    ):
        load_stored(Tied(), read_state_dict(path))


KINDS = [
    "uint16",
    "uint32",
    "uint64",
    "float8_e4m3fn",
    "float8_e5m2",
    "float8_e8m0fnu",
    "complex32",
    "complex64",
    "int8",
    "bool",
]


@pytest.mark.filterwarnings("ignore:.*experimental")
@pytest.mark.parametrize("kind", KINDS)
def test_every_dtype_that_torch_reads_is_read_and_no_other_than_a_weights_is_loaded(kind, tmp_path):
    stored = torch.zeros(32, dtype=torch.uint8).view(getattr(torch, kind))
    torch.save({"weight": stored}, tmp_path / "w.pth")
    read = read_state_dict(tmp_path / "w.pth")
    assert read.tensors["weight"].dtype == stored.dtype and read.tensors["weight"].shape == stored.shape
    with pytest.raises(ValueError, match=rf"w\.pth'.* weight holds {kind}, which are no weights; save the model in"):
        load_stored(torch.nn.Linear(len(stored), 1, bias=False), read)


@pytest.mark.filterwarnings("ignore:.*quantize", "ignore:.*[Ss]parse")
def test_tensors_of_other_kinds_are_said_to_be_such(tmp_path):
    for tensor, rule in (
        (torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8), "quantized tensors"),
        (torch.eye(4).to_sparse(), "sparse tensors"),
        (torch.ones(4, device="meta"), "tensors without values"),
    ):
        torch.save({"weight": tensor}, tmp_path / "w.pth")
        with pytest.raises(ValueError, match=rf"w\.pth': holds {rule}, which are no weights; save dense ones"):
            read_state_dict(tmp_path / "w.pth")


def script_checkpoint(path, **parts):
    """As timm, DeiT and torchvision's references write one, with their options and schedulers beside the weights."""
    state = {"milestones": Counter([3, 6]), "args": argparse.Namespace(lr=0.1, model="resnet18"), "epoch": 3}
    torch.save({**state, **parts}, path)


def weight(value):
    return {"weight": torch.full((1,), float(value))}


def test_averaged_weights_are_taken_and_said_or_those_of_the_key_that_is_given(tmp_path):
    path = tmp_path / "w.pth"
    averaged = {"n_averaged": torch.tensor(7), "module.weight": torch.full((1,), 2.0)}
    for parts in (
        {"model": weight(1), "model_ema": averaged},
        {"state_dict": weight(1), "state_dict_ema": weight(2)},
        {"model": {f"module.{name}": tensor for name, tensor in weight(1).items()}, "ema_state_dict": weight(2)},
    ):
        script_checkpoint(path, **parts)
        trained, taken = parts
        with pytest.warns(UserWarning, match=rf"under {taken} and {trained}; those under {taken} are .*:{trained} "):
            assert read_state_dict(path).tensors == weight(2)
        for key, value in ((trained, 1), (taken, 2)):
            assert read_state_dict(f"{path}:{key}").tensors == weight(value)


def test_one_state_dict_is_taken_without_a_word_and_others_are_named(tmp_path, recwarn):
    path = tmp_path / "w.pth"
    for parts in ({"model": weight(1)}, {"state_dict": {"model": weight(1)}}, {"model": weight(1), "model_ema": None}):
        script_checkpoint(path, **parts)
        assert read_state_dict(path).tensors == weight(1)
    script_checkpoint(path, student=weight(1), teacher=weight(2))
    with pytest.raises(ValueError, match=r"no state dict, but under 'student', 'teacher'; give .*w\.pth:student$"):
        read_state_dict(path)
    assert read_state_dict(f"{path}:teacher").tensors == weight(2)
    with pytest.raises(ValueError, match="holds no state dict under 'generator', but under 'student'"):
        read_state_dict(f"{path}:generator")
    script_checkpoint(path)
    with pytest.raises(ValueError, match=r"holds no state dict; write torch\.save"):
        read_state_dict(path)
    save_file(weight(1), tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="has no keys; leave :model out"):
        read_state_dict(tmp_path / "w.safetensors:model")
    assert not recwarn.list
    weight_named = tmp_path / "w.pth:model"
    torch.save(weight(5), weight_named)
    assert read_state_dict(weight_named).tensors == weight(5), "a file of that name is that file"


def test_a_parameter_comes_without_its_attributes(tmp_path):
    parameter = torch.nn.Parameter(torch.ones(1))
    parameter.detach = 1
    torch.save({"weight": parameter}, tmp_path / "w.pth")
    assert not vars(read_state_dict(tmp_path / "w.pth").tensors["weight"])
