"""The record, converted models as files, and what else works on a converted model."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch
from convert.nets import Gate, UNet, post_activation, pre_activation, randomise
from torch import nn

import normfree
from normfree.convert import Conversion, stored_conversion

IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def converted(start="fresh", build=lambda: post_activation(Gate)):
    torch.manual_seed(0)
    model = normfree.convert(randomise(build()), IMAGES, start=start, skip_gain=0.5)
    return model.eval()


def test_the_record_reads_back_as_it_was(tmp_path):
    record = converted().conversion
    document = json.loads(record.to_json(tmp_path / "record.json").read_text())
    assert document["schema"] == 1
    assert Conversion.from_dict(document) == record
    with pytest.raises(ValueError, match="schema=2: must be 1"):
        Conversion.from_dict({**document, "schema": 2})
    with pytest.raises(ValueError, match="no record of a conversion"):
        Conversion.from_dict({"schema": 1})


def test_the_printed_record_has_every_change_and_everything_left():
    record = converted().conversion
    lines = str(record).splitlines()
    assert "no normalizer left" in lines[0]
    assert any(line.startswith("1.conv2") and "γ = 1.713 of relu" in line for line in lines)
    assert any(line.startswith("5.bn2") and line.endswith("removed") for line in lines)
    assert any(line.startswith("8 ") and "kept" in line for line in lines)
    assert len(lines) == 3 + len(record.changes) + len(record.kept)


@pytest.mark.parametrize("start", ["fresh", "pretrained"])
@pytest.mark.parametrize("build", [lambda: post_activation(Gate), pre_activation, UNet])
@pytest.mark.parametrize("folded", [False, True])
def test_a_converted_model_comes_back_from_its_file(tmp_path, start, build, folded):
    model = converted(start, build)
    model = normfree.fold(model) if folded else model
    path = normfree.save(model, tmp_path / "model.safetensors")
    assert stored_conversion(path) == model.conversion
    back = normfree.load(path, original=build())  # of any weights
    with torch.no_grad():
        assert torch.equal(back(IMAGES), model(IMAGES))
    assert back.conversion == model.conversion


def test_files_that_do_not_fit(tmp_path):
    path = normfree.save(converted(), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"^original: .* holds a converted Sequential.*; pass the model it"):
        normfree.load(path)
    with pytest.raises(ValueError, match="it is not the model that"):
        normfree.load(path, original=UNet())
    with pytest.raises(ValueError, match="original='resnet': is no "):
        normfree.load(path, original="resnet")
    ours = normfree.create_model("nf_resnet50", widths=(8, 8, 8, 8), depths=(1, 1, 1, 1), num_classes=2)
    path = normfree.save(ours, tmp_path / "ours.safetensors")
    assert stored_conversion(path) is None
    assert type(normfree.load(path)) is type(ours)
    with pytest.raises(ValueError, match="holds no converted model; leave it out"):
        normfree.load(path, original=UNet())
    changed = converted()
    del changed[1]
    with pytest.raises(ValueError, match="is gone, so a file could not rebuild it"):
        normfree.save(changed, tmp_path / "changed.safetensors")
    assert not (tmp_path / "changed.safetensors").exists()


def test_a_converted_model_that_was_changed_is_kept_by_either_remedy(tmp_path):
    torch.manual_seed(0)
    original = randomise(post_activation(Gate))
    changed = normfree.convert(original, IMAGES)
    del changed[1]
    with pytest.raises(ValueError, match=r"change the original so and convert that, or keep model\.state_dict\(\) by "):
        normfree.save(changed, tmp_path / "changed.safetensors")
    safetensors.torch.save_file(changed.state_dict(), tmp_path / "state.safetensors")
    changed.load_state_dict(safetensors.torch.load_file(tmp_path / "state.safetensors"))
    del original[1]
    again = normfree.convert(original, IMAGES).eval()
    loaded = normfree.load(normfree.save(again, tmp_path / "again.safetensors"), original=original)
    assert torch.equal(loaded(IMAGES), again(IMAGES))


@pytest.mark.parametrize("start", ["fresh", "pretrained"])
def test_folding_leaves_plain_layers_and_the_function(start):
    model = converted(start)
    plain = normfree.fold(model)
    assert {type(m) for m in plain.modules() if isinstance(m, nn.Conv2d)} == {nn.Conv2d}
    with torch.no_grad():
        torch.testing.assert_close(plain(IMAGES), model(IMAGES), rtol=1e-4, atol=1e-5)


def test_the_exported_file_is_the_model(tmp_path):
    from normfree.export import to_program

    model = converted()
    exported = to_program(model, IMAGES, tmp_path / "model.pt2")
    with torch.no_grad():
        outputs = torch.export.load(exported.path).module()(IMAGES)
        torch.testing.assert_close(outputs, model(IMAGES), rtol=1e-4, atol=1e-5)


def test_what_was_frozen_is_so_when_it_comes_back(tmp_path):
    original = randomise(post_activation(Gate))
    for part in (original[0], original[2]):
        part.requires_grad_(False)
    model = normfree.convert(original.eval(), IMAGES, start="pretrained")
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    back = normfree.load(normfree.save(model, tmp_path / "model.safetensors"), original=original)
    assert {name for name, parameter in back.named_parameters() if not parameter.requires_grad} == frozen
    assert "2.conv1.gain" in frozen and "3.conv1.gain" not in frozen


def test_the_monitor_listens_to_its_training():
    model = converted().train()
    monitor = normfree.SignalMonitor(model, IMAGES, every=1)
    monitor.start()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    torch.nn.functional.cross_entropy(model(IMAGES), torch.arange(4)).backward()
    optimizer.step()
    monitor.step()
    monitor.stop()
    assert [step for step, _ in monitor.history] == [0, 1] and not monitor.failures
    before, after = (signal.curve("residual_avg_channel_var") for _, signal in monitor.history)
    listened = normfree.spp(model, IMAGES, mode="batch-statistics")
    assert after == pytest.approx(listened.curve("residual_avg_channel_var"), nan_ok=True) and after != before
    assert model.training


def test_half_and_double_precision():
    torch.manual_seed(0)
    model = post_activation().double()
    twice = normfree.convert(model, IMAGES.double())
    assert {p.dtype for p in twice.parameters()} == {torch.float64}
    once = normfree.convert(post_activation().bfloat16(), IMAGES.bfloat16())
    assert {p.dtype for p in once.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("start", ["fresh", "pretrained"])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_opacus_accepts_it_and_one_private_step_runs(start):
    opacus = pytest.importorskip("opacus")
    from opacus.validators import ModuleValidator

    model = converted(start).train()
    for module in model.modules():
        if getattr(module, "inplace", False):
            module.inplace = False
    assert ModuleValidator.validate(model, strict=False) == []
    assert ModuleValidator.validate(post_activation(), strict=False) != []
    data = torch.utils.data.TensorDataset(IMAGES, torch.arange(4))
    private, optimizer, loader = opacus.PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=torch.utils.data.DataLoader(data, batch_size=4),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
    )
    before = {name: parameter.detach().clone() for name, parameter in private.named_parameters()}
    for images, labels in loader:
        torch.nn.functional.cross_entropy(private(images), labels).backward()
        assert all(parameter.grad_sample is not None for parameter in private.parameters())
        optimizer.step()
    assert all(not torch.equal(parameter, before[name]) for name, parameter in private.named_parameters())


class Pretrained(nn.Module):
    """What a hub library's models have: a state dict that is saved, and a loader that passes over unknown names."""

    def __init__(self):
        super().__init__()
        self.body = post_activation()

    def forward(self, x):
        return self.body(x)

    def save_pretrained(self, folder):
        torch.save(self.state_dict(), folder / "weights.pt")

    @classmethod
    def from_pretrained(cls, folder):
        model = cls()
        model.load_state_dict(torch.load(folder / "weights.pt"), strict=False)
        return model.eval()


class OwnPadding(nn.Conv2d):
    def forward(self, x):
        return nn.functional.conv2d(nn.functional.pad(x, (1, 1, 1, 1)), self.weight, self.bias)


@pytest.mark.parametrize("start", ["fresh", "pretrained"])
@pytest.mark.parametrize("folded", [False, True])
def test_a_state_dict_is_not_taken_for_the_originals(tmp_path, start, folded):
    model = normfree.convert(randomise(Pretrained()).eval(), IMAGES, start=start)
    model = normfree.fold(model) if folded else model
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="size mismatch"):
        Pretrained.from_pretrained(tmp_path)
    assert sum(tensor.numel() == 0 for tensor in model.state_dict().values()) == 1
    again = normfree.convert(randomise(Pretrained(), 2).eval(), IMAGES, start=start)
    again = normfree.fold(again) if folded else again
    again.load_state_dict(torch.load(tmp_path / "weights.pt"))
    assert torch.equal(again(IMAGES), model(IMAGES))


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)),  # an affine map
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False)),
        lambda: nn.Sequential(OwnPadding(3, 4, 3), nn.BatchNorm2d(4)),
    ],
)
def test_every_kind_of_change_is_marked(build):
    converted = normfree.convert(build().eval(), IMAGES, start="pretrained")
    with pytest.raises(RuntimeError, match="size mismatch"):
        build().load_state_dict(converted.state_dict(), strict=False)


def test_files_without_the_mark_load(tmp_path):
    from safetensors.torch import load_file, safe_open, save_file

    model = converted()
    path = normfree.save(model, tmp_path / "model.safetensors")
    with safe_open(path, framework="pt") as file:
        notes = file.metadata()
    older = {name: tensor for name, tensor in load_file(path).items() if tensor.numel()}
    assert len(older) == len(model.state_dict()) - 1
    save_file(older, tmp_path / "older.safetensors", notes)
    back = normfree.load(tmp_path / "older.safetensors", original=post_activation(Gate))
    assert torch.equal(back(IMAGES), model(IMAGES))


def chain(activation=nn.ReLU, kind=nn.Sequential, **settings):
    first, second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, **settings)
    return kind(first, nn.BatchNorm2d(4), activation(), second, nn.BatchNorm2d(4), activation())


class Renamed(nn.Sequential):
    """A container of another class, which may have another forward."""


@pytest.mark.parametrize("start", ["fresh", "pretrained"])
def test_another_original_is_refused_or_told(start, tmp_path, recwarn):
    torch.manual_seed(0)
    path = normfree.save(normfree.convert(chain(), IMAGES, start=start), tmp_path / "m.safetensors")
    normfree.load(path, original=chain())
    assert not recwarn.list
    for activation in (nn.GELU, nn.Identity, nn.SiLU):
        with pytest.raises(ValueError, match=r"it is not the model that .* was converted from: 2 was ReLU\(\) and is"):
            normfree.load(path, original=chain(activation))
    for other, told in (
        (chain(stride=2), r"3 was Conv2d\(.*stride=\(1, 1\).* and is Conv2d\(.*stride=\(2, 2\)"),
        (chain(padding_mode="circular"), r"3 was Conv2d\(.* and is Conv2d\(.*padding_mode=circular"),
        (chain(kind=Renamed), r"it was Sequential\(\) and is Renamed\(\)"),
    ):
        with pytest.warns(UserWarning, match=rf"converted from another model than the original, .*: {told}"):
            normfree.load(path, original=other)


def test_a_record_without_the_original_s_modules_is_read(tmp_path):
    document = converted().conversion.to_dict()
    del document["original"]
    assert Conversion.from_dict(document).original == {}
