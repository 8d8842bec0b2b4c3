"""A pickle of arrays in plain containers is read as written; anything else is refused."""

import base64
import collections
import pickle
import random
import struct
import sys
import types
import warnings

import numpy as np
import pytest

from normfree.weights.haiku import read_pickle

TREE = {
    "NFNet/~/linear": {"w": np.arange(6, dtype="f4").reshape(2, 3), "b": np.zeros(3, "f4")},
    "NFNet/~/nf_block_1": {"skip_gain": np.array(0.5, "f4"), "scalar": np.float32(2)},
    "layouts": {
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "strided": np.arange(12, dtype="i8").reshape(3, 4)[:, ::2],
        "big": np.arange(3, dtype=">f8"),
        "half": np.arange(3, dtype="f2"),
        "flags": np.array([True, False]),
        "none": np.zeros((0, 3), "f4"),
    },
}

# {"NFNet/~/linear": {"w": arange(6).reshape(2, 3), "b": zeros(3)}} as dill itself wrote it. 0.3.3, of the published
# files' time, spells numpy's functions as attributes of an imported module; 0.4.0 has a function of its own.
BY_DILL = {
    "0.3.3": "gAN9cQBYDgAAAE5GTmV0L34vbGluZWFycQF9cQIoWAEAAAB3cQNjZGlsbC5fZGlsbApfZ2V0X2F0dHIKcQRjZGlsbC5fZGlsbApfaW1w"
    "b3J0X21vZHVsZQpxBVgdAAAAbnVtcHkuX2NvcmUuX211bHRpYXJyYXlfdW1hdGhxBoVxB1JxCFgMAAAAX3JlY29uc3RydWN0cQmGcQpScQtjbnVt"
    "cHkKbmRhcnJheQpxDEsAhXENQwFicQ6HcQ9ScRAoSwFLAksDhnERY251bXB5CmR0eXBlCnESWAIAAABmNHETiYiHcRRScRUoSwNYAQAAADxxFk5O"
    "Tkr/////Sv////9LAHRxF2KJQxgAAAAAAACAPwAAAEAAAEBAAACAQAAAoEBxGHRxGWJYAQAAAGJxGmgLaAxLAIVxG2gOh3EcUnEdKEsBSwOFcR5o"
    "FYlDDAAAAAAAAAAAAAAAAHEfdHEgYnVzLg==",
    "0.4.0": "gASVFAEAAAAAAAB9lIwOTkZOZXQvfi9saW5lYXKUfZQojAF3lIwKZGlsbC5fZGlsbJSMDV9jcmVhdGVfYXJyYXmUk5QojBZudW1weS5f"
    "Y29yZS5tdWx0aWFycmF5lIwMX3JlY29uc3RydWN0lJOUjAVudW1weZSMB25kYXJyYXmUk5RLAIWUQwFilIeUKEsBSwJLA4aUaAqMBWR0eXBllJOU"
    "jAJmNJSJiIeUUpQoSwOMATyUTk5OSv////9K/////0sAdJRiiUMYAAAAAAAAgD8AAABAAABAQAAAgEAAAKBAlHSUTnSUUpSMAWKUaAYoaAloDEsA"
    "hZRoDoeUKEsBSwOFlGgViUMMAAAAAAAAAAAAAAAAlHSUTnSUUpR1cy4=",
}


def written(tmp_path, content, name="F0_haiku.npz"):
    path = tmp_path / name
    path.write_bytes(content)
    return path


def same(actual, expected):
    assert type(actual) is dict
    assert list(actual) == list(expected)
    for path, group in expected.items():
        assert type(actual[path]) is dict
        assert list(actual[path]) == list(group)
        for name, array in group.items():
            assert type(actual[path][name]) is np.ndarray
            assert actual[path][name].dtype == array.dtype
            np.testing.assert_array_equal(actual[path][name], array)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_reads_arrays_of_every_protocol(tmp_path, protocol):
    tree = {path: dict(group) for path, group in TREE.items()}
    if protocol == 2:  # writes no bytes as a call of `bytes`, which no weight needs
        del tree["layouts"]["none"]
    content = pickle.dumps(tree, protocol)
    same(read_pickle(written(tmp_path, content)), tree)
    if protocol < 4:  # names of numpy before version 2
        same(read_pickle(written(tmp_path, content.replace(b"numpy._core.", b"numpy.core."))), tree)


@pytest.mark.parametrize("version", BY_DILL)
def test_reads_what_dill_wrote(tmp_path, version):
    tree = read_pickle(written(tmp_path, base64.b64decode(BY_DILL[version])))
    same(tree, {"NFNet/~/linear": TREE["NFNet/~/linear"]})


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("name", ["FlatMapping", "frozendict"])
def test_reads_haikus_mappings_as_dicts(tmp_path, monkeypatch, name, protocol):
    for parent in ("haiku", "haiku._src"):
        monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    module = types.ModuleType("haiku._src.data_structures")

    def reduce(self):
        return type(self), (dict(self.content),)

    kind = type(name, (), {"__module__": module.__name__, "__reduce__": reduce})
    setattr(module, name, kind)
    monkeypatch.setitem(sys.modules, module.__name__, module)

    def frozen(content):
        mapping = kind()
        mapping.content = content
        return mapping

    small = {path: group for path, group in TREE.items() if path != "layouts"}
    content = pickle.dumps(frozen({path: frozen(group) for path, group in small.items()}), protocol)
    monkeypatch.undo()
    same(read_pickle(written(tmp_path, content)), small)


def test_keeps_plain_values_and_shared_parts(tmp_path):
    shared = {"w": np.ones(2)}
    value = [None, True, -3, 2.5, 2**80, "ä", b"b", bytearray(b"c"), (), [{}], shared, shared, {"a": (1, shared)}]
    ordered = collections.OrderedDict(a=1)
    read = read_pickle(written(tmp_path, pickle.dumps([*value, ordered], 5)))
    assert repr(read) == repr([*value, {"a": 1}])
    assert read[10] is read[11] is read[12]["a"][1]


def test_reading_is_linear_in_a_lattice_of_shared_lists(tmp_path):
    lattice = []
    for _ in range(14):
        lattice = [lattice] * 9  # 9^14 paths
    assert len(read_pickle(written(tmp_path, pickle.dumps(lattice, 4)))) == 9


def refused(path):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is looked at below
        read_pickle(path)
    message = str(caught.value)
    assert message.isprintable()
    assert message.startswith(f"source={str(path)!r}: ")
    assert "; pass a file the authors published" in message
    return message


def strange_arrays():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {
            "objects": np.array([{}, 1], dtype=object),
            "metadata": np.ones(2, np.dtype("f4", metadata={"a": 1})),
            "fields": np.ones(2, [("a", "f4")]),
            "text": np.array(["a"]),
            "bytes": np.array([b"a"]),
            "time": np.array(["2021-01-01"], "M8[D]"),
            "complex": np.ones(2, "c8"),
        }


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("name", strange_arrays())
def test_arrays_of_anything_but_numbers_are_refused(tmp_path, name, protocol):
    refused(written(tmp_path, pickle.dumps({"a": {"w": strange_arrays()[name]}}, protocol)))


class Reduced:
    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize("shape", [(2**40, 2**40), (2**62,), (3,), (-2, -2), (2.0, 2), "ab", (True, 4), 4, None])
def test_a_shape_is_believed_only_with_its_bytes(tmp_path, shape):
    kind, arguments, state = np.ones((2, 2), "f4").__reduce__()
    reason = refused(written(tmp_path, pickle.dumps(Reduced(kind, arguments, (state[0], shape, *state[2:])), 4)))
    assert "array of shape" in reason


SHARED = b")q\x000" + b"".join(b"h%ch%c\x86q%c0" % (i, i, i + 1) for i in range(60)) + b"h<"

NO_PICKLES = {
    "empty": (b"", "no pickle of protocol 2 to 5"),
    "text": (b"Not found", "no pickle of protocol 2 to 5"),
    "json": (b'{"a": 1}', "no pickle of protocol 2 to 5"),
    "zip": (b"PK\x03\x04" + bytes(40), "no pickle of protocol 2 to 5"),
    "npy": (b"\x93NUMPY\x01\x00", "no pickle of protocol 2 to 5"),
    "protocol 6": (b"\x80\x06N.", "no sound pickle"),
    "no stop": (b"\x80\x04}", "no sound pickle"),
    "empty stack": (b"\x80\x04R.", "no sound pickle"),
    "memo bomb": (b"\x80\x02Nr\xff\xff\xff\x7f.", "puts entry 2147483647 into a memo of at most 2"),
    "bytes bomb": (b"\x80\x04\x8e" + struct.pack("<Q", 1 << 60) + b".", "no sound pickle"),
    "frame bomb": (b"\x80\x04\x95" + struct.pack("<Q", 1 << 60) + b"N.", "no sound pickle"),
    "list in itself": (b"\x80\x02]q\x00h\x00a.", "nested deeper"),
    "dict in itself": (b"\x80\x02}q\x00K\x01h\x00s.", "nested deeper"),
    "unhashable key": (b"\x80\x02}]K\x01s.", "has a key of type list"),
    # Tuples of two that share their parts: 2**60 leaves, of which hash and repr would look at each.
    "exponential key": (b"\x80\x02}" + SHARED + b"K\x01s.", "has a key of type tuple"),
    "exponential keys": (b"\x80\x02}(" + SHARED + b"K\x01u.", "has a key of type tuple"),
    "exponential keys of a dict": (b"\x80\x02(" + SHARED + b"K\x01d.", "has a key of type tuple"),
    "exponential dtype": (b"\x80\x02cnumpy\ndtype\n" + SHARED + b"\x85R.", "has an array of dtype"),
    "exponential value": (b"\x80\x02" + SHARED + b".", "nested deeper"),
    "append to a class": (b"\x80\x02cnumpy\nndarray\nK\x01a.", "no sound pickle"),
}


@pytest.mark.parametrize("name", NO_PICKLES)
def test_what_is_no_such_pickle_is_refused(tmp_path, name):
    content, reason = NO_PICKLES[name]
    assert reason in refused(written(tmp_path, content))


def test_a_missing_file_is_refused(tmp_path):
    assert "is no file" in refused(tmp_path / "none.npz")
    assert "is a folder" in refused(tmp_path)


@pytest.mark.parametrize("protocol", [2, 5])
def test_every_truncation_is_refused(tmp_path, protocol):
    content = pickle.dumps({"a": {"w": np.ones(2)}}, protocol)
    for length in range(len(content)):
        refused(written(tmp_path, content[:length]))


def test_damage_is_read_or_refused_but_nothing_else(tmp_path):
    content = pickle.dumps({path: TREE[path] for path in list(TREE)[:2]}, 4)
    draw = random.Random(0)
    outcomes = collections.Counter()
    for _ in range(400):
        damaged = bytearray(content)
        for _ in range(draw.randint(1, 4)):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        try:
            read_pickle(written(tmp_path, bytes(damaged)))
            outcomes["read"] += 1
        except ValueError:
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 20
