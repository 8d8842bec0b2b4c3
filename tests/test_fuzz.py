"""Readers of files from outside, given anything: what they read, or one short line that names the file.

Examples are drawn from a fixed seed (``derandomize``); what once failed is kept as an explicit example.
"""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import normfree
from normfree.common.files import parse_dataclass, read, read_json, sizes
from normfree.convert import Conversion
from normfree.data.records import decode, header_size
from normfree.train.checkpoint import verify_checkpoint
from normfree.train.config import RECIPES, TrainConfig, from_dict, to_dict
from normfree.train.records import read_rows
from normfree.train.trained import open_trained
from normfree.weights.checkpoint import load

FUZZ = settings(
    derandomize=True, deadline=None, max_examples=150, suppress_health_check=list(HealthCheck), database=None
)
SLOW = settings(FUZZ, max_examples=40)
ACTING = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**9, 10**18, -1, 10**400])
    | st.floats()
    | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def folder() -> Path:
    return Path(tempfile.mkdtemp(dir=PLACE))


PLACE = tempfile.mkdtemp()


def refused_or(call, *names):
    """What a call returns, or None where it raises the one error it may."""
    try:
        return call()
    except ValueError as error:
        said = str(error)
        assert len(said) <= 500 and not ACTING.search(said), said
        assert all(name in said for name in names), said
        return None


def mutated(content: bytes, edits: list[tuple[int, int, int]]) -> bytes:
    """Bytes with some of them changed, cut out or repeated."""
    data = bytearray(content)
    for kind, position, value in edits:
        place = position % max(1, len(data))
        if kind == 0 and data:
            data[place] = value
        elif kind == 1:
            del data[place : place + value]
        else:
            data[place:place] = data[place : place + value]
    return bytes(data)


EDITS = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=6)
SMALL = {"num_classes": 2, "in_channels": 1, "depths": [1, 1, 1, 1], "widths": [8, 8, 8, 8], "stem": "cifar"}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    return normfree.save(normfree.create_model("nf_resnet50", **SMALL), path).read_bytes()


@SLOW
@given(
    st.dictionaries(st.sampled_from(["name", "depths", "widths", "width", "num_classes", "activation", "x"]), VALUES)
)
@example({"depths": [10**9, 1, 1, 1]})
@example({"width": 1e308})
@example({"num_classes": 10**400})
def test_notes(changes):
    path = folder() / "m.safetensors"
    note = json.dumps({"name": "nf_resnet50", **SMALL, **changes})
    save_file({"a": torch.zeros(1)}, path, {"normfree": note})
    assert refused_or(lambda: load(path), "m.safetensors") is None


@FUZZ
@given(EDITS)
@example([(1, 0, 8)])
def test_weights(weights, edits):
    path = folder() / "m.safetensors"
    path.write_bytes(mutated(weights, edits))
    stored = refused_or(lambda: read(path), "m.safetensors")
    refused_or(lambda: sizes(path), "m.safetensors")
    if stored is not None:
        refused_or(lambda: load(path), "m.safetensors")


@pytest.fixture(scope="module")
def record():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    return normfree.convert(model, torch.randn(4, 1, 8, 8)).conversion.to_dict()


@FUZZ
@given(st.data())
def test_conversion_records(record, data):
    changed = json.loads(json.dumps(record))
    place = data.draw(st.sampled_from([changed, changed["changes"][0]]))
    place[data.draw(st.sampled_from(sorted(place)) | st.text(max_size=5))] = data.draw(VALUES)
    read_back = refused_or(lambda: Conversion.from_dict(changed))
    if read_back is not None:
        assert Conversion.from_dict(json.loads(json.dumps(read_back.to_dict()))) == read_back
        str(read_back)


@FUZZ
@given(VALUES, st.sampled_from(sorted(to_dict(RECIPES["digits"]()))))
def test_run_configs(value, name):
    refused_or(lambda: from_dict(TrainConfig, {**to_dict(RECIPES["digits"]()), name: value}))


@FUZZ
@given(VALUES, VALUES)
def test_what_a_run_says_of_itself(data, classes):
    place = folder()
    (place / "config.json").write_text(json.dumps({"config": {}, "derived": {"data": data, "classes": classes}}))
    refused_or(lambda: open_trained(place), "")


@FUZZ
@given(
    st.binary(max_size=200) | st.text(max_size=100).map(lambda text: ("step,loss\n" + text).encode("utf-8", "ignore"))
)
@example(b"step,loss\n1,2,3,4\n")
@example("step\n²\n".encode())
@example(b"step\n" + b"9" * 5000)
@example(b"\xff\xfe")
@example(b"step\n\x00")
def test_curves(content):
    path = folder() / "train.csv"
    path.write_bytes(content)
    rows = refused_or(lambda: read_rows(path), "train.csv")
    for row in rows or []:
        assert all(value is None or isinstance(value, (int, float)) for value in row.values())


@FUZZ
@given(VALUES)
@example({"schema": 1, "history": [{"step": 1e400, "signal": {}}]})
def test_histories(document):
    path = folder() / "h.json"
    path.write_text(json.dumps(document))
    refused_or(lambda: normfree.SignalHistory.load(path), "h.json")
    refused_or(lambda: normfree.SignalHistory.from_dict({"schema": 1, "history": [document]}))


@FUZZ
@given(VALUES, st.sampled_from(["schema", "step", "score", "files", "sha256", "x"]))
def test_manifests(value, name):
    place = folder()
    manifest = {"schema": 1, "step": 1, "score": None, "files": {}, "sha256": ""}
    (place / "manifest.json").write_text(json.dumps({**manifest, name: value}))
    assert refused_or(lambda: verify_checkpoint(place), "damaged") is None


@FUZZ
@given(st.binary(max_size=300))
@example(b"[" * 100_000)
@example(b'{"a": ' + b"9" * 5000 + b"}")
@example(b"\xef\xbb\xbf{}")
def test_json(content):
    path = folder() / "a.json"
    path.write_bytes(content)
    refused_or(lambda: read_json(path), "a.json")


@FUZZ
@given(st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM"]), EDITS)
def test_images(kind, edits):
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(file, kind)
    content = mutated(file.getvalue(), edits)
    header_size(content)
    refused_or(lambda: decode(content).convert("RGB"))


@FUZZ
@given(st.binary(max_size=200), st.booleans())
def test_official_weights(content, pickled):
    path = folder() / "w.npz"
    path.write_bytes((b"\x80\x04" if pickled else b"PK\x03\x04") + content)
    model = normfree.create_model("nf_resnet50", **SMALL)
    refused_or(lambda: normfree.load_haiku_weights(model, path), "w.npz")


def test_values_keep_their_types():
    config = RECIPES["digits"]()
    assert parse_dataclass(TrainConfig, json.loads(json.dumps(to_dict(config)))) == config
    for value in (True, 1.5, "1", None, [1]):
        with pytest.raises(ValueError, match=r"TrainConfig\.epochs"):
            parse_dataclass(TrainConfig, {**to_dict(config), "epochs": value})
