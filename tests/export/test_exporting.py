"""What is checked before a file is kept, what is left when it is not, and what is told where there is no export."""

from __future__ import annotations

import copy
import dataclasses
import logging
import random
import re
import resource
import signal
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from normfree.export import Difference, Exported, exported, to_onnx, to_program
from normfree.export.exported import PROGRAM, Format, export
from normfree.nn import ScaledConv2d

WRITERS = {"onnx": to_onnx, "pt2": to_program}


@pytest.fixture(params=WRITERS)
def suffix(request):
    return request.param


class Gated(nn.Module):
    """A branch that a zero gain silences, as skip gains and last norms do at initialisation."""

    def __init__(self):
        super().__init__()
        self.branch = nn.Linear(4, 4)
        self.gain = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return x + self.gain * self.branch(x)


class Named(nn.Module):
    """Two inputs, one of them of indices; two outputs by name."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.linear = nn.Linear(4, 4)
        nn.init.normal_(self.linear.bias)

    def forward(self, image, index):
        return {"sum": self.linear(image) + self.table(index), "scaled": image * 3}


class Branching(nn.Module):
    def forward(self, x):
        return x * 2 if x.sum() > 0 else x


class FixedBatch(nn.Module):
    def forward(self, x):
        return x.reshape(-1, 2, 4).sum(1)


class NoOnnxForm(nn.Module):
    def forward(self, x):
        return torch.linalg.svdvals(x)


class Untraceable(nn.Module):
    def forward(self, x):
        return torch.from_numpy(np.sort(x.numpy()))


class Sulking(nn.Module):
    def forward(self, x):
        raise KeyError("sulks")


class Apart(nn.Module):
    """Inputs that share no axis."""

    def forward(self, image, weight):
        return image @ weight


class Returning(nn.Module):
    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, x):
        return self.output


class InPlace(nn.Module):
    def forward(self, x):
        return x.add_(1).relu_()


def test_model_randomness_and_settings_are_left_as_they_were(suffix, tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)).train()
    model[2].eval()
    before = copy.deepcopy(model.state_dict())
    state, filters, level = torch.get_rng_state(), list(warnings.filters), logging.root.manager.disable
    example = torch.randn(2, 3, 8, 8)
    kept = example.clone()
    state = torch.get_rng_state()
    WRITERS[suffix](model, example, tmp_path / f"m.{suffix}")
    assert [module.training for module in model] == [True, True, False]
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(example, kept)
    assert (list(warnings.filters), logging.root.manager.disable) == (filters, level)
    assert [path.name for path in tmp_path.iterdir()] == [f"m.{suffix}"]


class Drawing(nn.Linear):
    """Draws random numbers in evaluation, and leaves what it has computed on itself."""

    def forward(self, x):
        self.last = self.weight * 2  # no leaf of autograd's graph
        return super().forward(x) + 0 * torch.rand(1) + 0 * random.random()


def test_what_hooks_note_and_forwards_draw_is_left_as_it_was(suffix, tmp_path):
    model, seen = Drawing(4, 3), ["before"]
    model(torch.ones(2, 4))
    model.register_forward_hook(lambda module, inputs, output: seen.append(output))
    states = torch.get_rng_state(), random.getstate()
    WRITERS[suffix](model, torch.ones(2, 4), tmp_path / f"m.{suffix}", tolerance=1.0)
    assert seen == ["before"]
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]


def test_in_two_threads_streams_warnings_and_logging_are_left_as_they_were(tmp_path):
    models = [nn.Sequential(nn.Linear(4, 3), nn.ReLU()) for _ in range(4)]
    before = sys.stdout, sys.stderr, list(warnings.filters), logging.root.manager.disable
    with ThreadPoolExecutor(4) as pool:
        written = [pool.submit(to_program, m, X, tmp_path / f"{i}.pt2") for i, m in enumerate(models)]
        assert all(one.result().file.relative == 0 for one in written)
    assert (sys.stdout, sys.stderr, list(warnings.filters), logging.root.manager.disable) == before


def wrong(kind: Format, by: float) -> Format:
    """A format whose files answer a little beside the truth."""

    def read(path):
        opened = kind.read(path)
        return dataclasses.replace(opened, answer=lambda arguments: [y + by for y in opened.answer(arguments)])

    return dataclasses.replace(kind, read=read)


def test_a_file_that_differs_is_not_kept_and_an_older_one_is(linear, tmp_path):
    path = tmp_path / "m.pt2"
    path.write_bytes(b"older")
    x = torch.randn(2, 4)
    with pytest.raises(ValueError, match=r"^model: the file, read back, differs .* more than tolerance=3\.5e-04"):
        export(wrong(PROGRAM, 0.01), linear, x, path, dynamic_batch=False, tolerance=None)
    assert path.read_bytes() == b"older"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match="differs"):
        export(wrong(PROGRAM, 0.01), linear, x, tmp_path / "a" / "b" / "m.pt2", dynamic_batch=False, tolerance=None)
    assert list(tmp_path.iterdir()) == [path]
    kept = export(wrong(PROGRAM, 0.01), linear, x, path, dynamic_batch=False, tolerance=0.1)
    assert kept.file.absolute == pytest.approx(0.01, rel=1e-3)
    assert path.read_bytes() != b"older"


def test_folding_is_checked_too(tmp_path, monkeypatch):
    layer = ScaledConv2d(3, 4, 3)
    plain = layer.plain(layer.weight.detach() * 1.01, None)
    monkeypatch.setattr(ScaledConv2d, "folded", lambda self: plain)
    with pytest.raises(ValueError, match="the folded model differs"):
        to_program(layer, torch.randn(2, 3, 8, 8), tmp_path / "m.pt2")


def test_what_a_zero_hides_is_checked_in_a_rehearsal(tmp_path):
    def read(path):  # a format that loses all branches: right as long as the gain is zero
        opened = PROGRAM.read(path)
        return dataclasses.replace(opened, answer=lambda arguments: arguments.tensors)

    lossy = dataclasses.replace(PROGRAM, read=read)
    model, x, path = Gated(), torch.randn(2, 4), tmp_path / "m.pt2"
    with pytest.raises(ValueError, match="rehearsal"):
        export(lossy, model, x, path, dynamic_batch=False, tolerance=None)
    assert not list(tmp_path.iterdir())
    result = to_program(model, x, path)
    assert result.silent == ("gain",)
    assert result.rehearsal == Difference(0.0, 0.0)
    assert torch.equal(torch.export.load(path).module()(x), x)  # the file has the zeros again
    model.gain.data.fill_(1.0)
    with pytest.raises(ValueError, match="the file, read back"):
        export(lossy, model, x, path, dynamic_batch=False, tolerance=None)


def test_a_rehearsal_that_overflows_is_left_out(tmp_path):
    class Overflowing(Gated):
        def forward(self, x):
            return x + self.gain * 3e38 * 1e3

    assert to_program(Overflowing(), torch.randn(2, 4), tmp_path / "m.pt2").rehearsal is None


@pytest.mark.parametrize("batch_size", [1, 3])
def test_inputs_and_outputs_keep_their_names(batch_size, tmp_path):
    example = {"index": torch.randint(7, (batch_size,)), "image": torch.randn(batch_size, 4)}
    model = Named().eval()
    result = to_onnx(model, example, tmp_path / "m.onnx", dynamic_batch=True)
    assert set(result.input_shapes) == {(max(2, batch_size),), (max(2, batch_size), 4)}
    session = onnxruntime.InferenceSession(result.path, providers=["CPUExecutionProvider"])
    image, index = torch.randn(5, 4), torch.arange(5)
    found = session.run(["sum", "scaled"], {"image": image.numpy(), "index": index.numpy()})
    for name, actual in zip(("sum", "scaled"), found, strict=True):
        torch.testing.assert_close(torch.from_numpy(actual), model(image, index)[name])
    to_program(model, example, tmp_path / "m.pt2", dynamic_batch=True)
    loaded = torch.export.load(tmp_path / "m.pt2").module()
    torch.testing.assert_close(loaded(index=index, image=image), model(image, index))


def test_several_outputs_are_numbered_and_positional_inputs_may_be_nested(tmp_path):
    class Nested(nn.Module):
        def forward(self, pair, x):
            return pair[0] - pair[1], x * 2

    example = ((torch.randn(2, 3), torch.randn(2, 3)), torch.randn(2))
    path = to_onnx(Nested(), example, tmp_path / "m.onnx", dynamic_batch=True).path
    assert [put.name for put in onnx.load(path).graph.output] == ["output_0", "output_1"]


def test_a_program_does_not_keep_the_example(linear, tmp_path):
    x = torch.arange(8.0).reshape(2, 4)
    (kept,), _ = torch.export.load(to_program(linear, x, tmp_path / "m.pt2").path).example_inputs
    assert kept.shape == x.shape
    assert not torch.equal(kept, x)


def test_a_model_that_writes_to_its_input(suffix, tmp_path):
    x = -torch.rand(2, 4) / 2
    result = WRITERS[suffix](InPlace(), x, tmp_path / f"m.{suffix}")
    assert result.file.relative < 1e-6
    assert (x < 0).all()


def test_other_precisions(tmp_path, linear):
    model, x = copy.deepcopy(linear).bfloat16(), torch.randn(2, 4, dtype=torch.bfloat16)
    assert to_program(model, x, tmp_path / "m.pt2").tolerance == pytest.approx(0.088, rel=0.01)
    assert torch.export.load(tmp_path / "m.pt2").module()(x).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"ONNX Runtime does not run it on a CPU.*float32.*--format pt2"):
        to_onnx(model, x, tmp_path / "m.onnx")


def test_metadata_are_in_the_file(suffix, linear, tmp_path):
    path, said = tmp_path / f"m.{suffix}", {"classes": '["a", "ä"]', "more": "text"}
    WRITERS[suffix](linear, torch.randn(2, 4), path, metadata=said)
    if suffix == "onnx":
        import onnxruntime

        assert onnxruntime.InferenceSession(str(path)).get_modelmeta().custom_metadata_map == said
    else:
        found = dict.fromkeys(said, "")
        torch.export.load(path, extra_files=found)
        assert found == said
    with pytest.raises(ValueError, match=r"^metadata=.*must be text by name"):
        WRITERS[suffix](linear, torch.randn(2, 4), path, metadata={"classes": ["a"]})


def test_large_weights_go_to_a_second_file(tmp_path, monkeypatch):
    monkeypatch.setattr(exported, "ONE_FILE", 16)
    model, x, path = nn.Linear(100, 3), torch.randn(2, 100), tmp_path / "m.onnx"
    result = to_onnx(model, x, path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    assert result.size == sum(file.stat().st_size for file in tmp_path.iterdir()) > 1200
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    torch.testing.assert_close(torch.from_numpy(session.run(None, {"input": x.numpy()})[0]), model(x).detach())
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"weights go to '.*m\.onnx\.data', which exists; remove it"):
        to_onnx(nn.Linear(100, 3), x, path)
    assert before == {file: file.read_bytes() for file in tmp_path.iterdir()}


def uncopied():
    model = nn.Linear(4, 3)
    model.lock = threading.Lock()
    return model


X = torch.ones(2, 4)
REFUSED = {
    "no module": ("onnx", lambda x: x, X, {}, r"^model: function is no torch\.nn\.Module"),
    "no weights": ("onnx", nn.Linear(4, 3, device="meta"), X, {}, r"^model: .*meta device"),
    "no copy": ("onnx", uncopied(), X, {}, r"^model: Linear cannot be copied \(TypeError: .*lock.*\); take off"),
    "wrong shape": ("onnx", nn.Linear(3, 4), X, {}, r"^model: .*\[2, 4\] with RuntimeError: .*example input"),
    "not a tensor": ("pt2", nn.Linear(4, 3), "x", {}, r"^example_input='x': must hold tensors alone; pass"),
    "a number among tensors": ("pt2", nn.Linear(4, 3), (X, 3), {}, r"^example_input=3: must hold tensors alone"),
    "nothing": ("pt2", nn.Linear(4, 3), (), {}, r"^example_input='nothing'"),
    "empty": ("pt2", nn.Linear(4, 3), X[:0], {}, r"^example_input=\(0, 4\): .*empty"),
    "model that fails": ("pt2", Sulking(), X, {}, r"^model: .*with KeyError: 'sulks'; give an example input"),
    "no flag": ("pt2", nn.Linear(4, 3), X, {"dynamic_batch": 1}, r"^dynamic_batch=1: must be True or False"),
    "no tolerance": ("pt2", nn.Linear(4, 3), X, {"tolerance": -1.0}, r"^tolerance=-1\.0: must be .* at least 0"),
    "no tensor returned": ("pt2", Returning(None), X, {}, r"^model: it returned NoneType and no tensor"),
    "not a number returned": ("pt2", Returning(X / 0 - X / 0), X, {}, r"^model: .*\(NaN\)"),
    "control flow on data": (
        "onnx",
        Branching(),
        X,
        {},
        r"branches on the values of a tensor \(.*test_exporting\.py, line \d+: return x \* 2 if .*torch\.where",
    ),
    "batch in a reshape": ("pt2", FixedBatch(), X, {"dynamic_batch": True}, r"only works for some batch sizes.*-1"),
    "inputs of different sizes": (
        "onnx",
        Apart(),
        (X, torch.ones(4, 3)),
        {"dynamic_batch": True},
        r"^dynamic_batch=True: the inputs \[2, 4\], \[4, 3\] have no leading axis of one size",
    ),
    "numpy inside": ("pt2", Untraceable(), X, {}, r"^model: torch\.export cannot trace it: RuntimeError: .*numpy"),
    "no such operator": ("onnx", NoOnnxForm(), X, {}, r"no ONNX form: DispatchError: .*aten\._linalg_svd.*pt2"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_exported_is_told_in_one_line_and_leaves_nothing(case, tmp_path, capfd):
    suffix, model, example, options, pattern = REFUSED[case]
    with pytest.raises(ValueError, match=r"(?s).") as told:
        WRITERS[suffix](model, example, tmp_path / "new" / f"m.{suffix}", **options)
    message = str(told.value)
    assert re.search(pattern, message), message
    assert "\n" not in message
    assert "\x1b" not in message
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")


def test_places_that_cannot_be_written_to(suffix, linear, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / f"folder.{suffix}").mkdir()
    refused = {
        tmp_path / "m.bin": rf"m\.bin': must end in \.{suffix}; pass '.*m\.{suffix}'",
        tmp_path / f"folder.{suffix}": "is a folder",
        tmp_path / "file" / f"m.{suffix}": "is a file, not a folder",
        f"/proc/m.{suffix}": "cannot be written to",
    }
    for path, pattern in refused.items():
        with pytest.raises(ValueError, match=rf"^path='.*{pattern}"):
            WRITERS[suffix](linear, torch.randn(2, 4), path)
    with pytest.raises(ValueError, match="path=3: must be a path"):
        WRITERS[suffix](linear, torch.randn(2, 4), 3)


def test_a_full_disk_leaves_nothing(suffix, tmp_path):
    handler, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    model = nn.Linear(100, 100)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        with pytest.raises(OSError, match=r"."):
            WRITERS[suffix](model, torch.randn(2, 100), tmp_path / "new" / f"m.{suffix}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named(monkeypatch, linear, tmp_path):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"^ONNX needs onnxruntime, .*; pip install 'normfree\[export\]'$"):
        to_onnx(linear, torch.randn(2, 4), tmp_path / "m.onnx")
    assert isinstance(to_program(linear, torch.randn(2, 4), tmp_path / "m.pt2"), Exported)
