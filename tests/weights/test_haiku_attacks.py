"""What attackers put into pickles is refused, and not run."""

import copyreg
import io
import os
import pickle
import struct
import subprocess

import numpy as np
import pytest

from normfree.weights import haiku
from normfree.weights.haiku import read_pickle


def written(tmp_path, content):
    path = tmp_path / "F0_haiku.npz"
    path.write_bytes(content)
    return path


def call(module, name, *arguments, protocol=2):
    """A call of module.name by REDUCE."""
    content = io.BytesIO()
    pickler = pickle.Pickler(content, protocol)
    pickler.dump(arguments)
    packed = content.getvalue()[2:-1]
    return b"\x80" + bytes([protocol]) + f"c{module}\n{name}\n".encode() + packed + b"R."


def text(value):
    return b"\x8c" + bytes([len(value)]) + value.encode()


def stack_global(module, name, rest):
    return b"\x80\x04" + text(module) + text(name) + b"\x93" + rest


class Evil:
    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


def attacks(sentinel):
    """Return pickles by name; most would create the file ``sentinel``."""
    shell = f"touch {sentinel}"
    code = f"open({str(sentinel)!r}, 'w')"
    line = shell.encode() + b"\n"
    argument = b"X" + struct.pack("<I", len(shell)) + shell.encode()
    array = np.ones(2, "f4")
    state = array.__reduce__()[2]
    evil = Evil(os.system, (shell,))
    return {
        **{f"os.system {p}": pickle.dumps(evil, p) for p in range(6)},
        **{f"os.system in an array {p}": pickle.dumps({"a": {"w": array, "b": evil}}, p) for p in range(2, 6)},
        "popen": pickle.dumps(Evil(subprocess.Popen, (["touch", str(sentinel)],))),
        **{f"builtins.{name}": call("builtins", name, code) for name in ("eval", "exec", "__import__", "compile")},
        **{f"__builtin__.{name}": call("__builtin__", name, code) for name in ("eval", "execfile", "apply")},
        "getattr": call("builtins", "getattr", "a", "format"),
        "BUILD": b"\x80\x02cnumpy\ndtype\nX\x02\x00\x00\x00f4\x85Rcposix\nsystem\n" + argument + b"\x85Rb.",
        "BUILD of a function": b"\x80\x02cnumpy._core.multiarray\n_reconstruct\n}X\x03\x00\x00\x00abcK\x01sb.",
        "BUILD of a class": b"\x80\x02cnumpy\nndarray\n}X\x0b\x00\x00\x00__reduce__\x00K\x01sb.",
        "state of an array": pickle.dumps(Evil(array.__reduce__()[0], array.__reduce__()[1], (*state[:4], evil)), 4),
        "INST": b"\x80\x02(" + argument + b"iposix\nsystem\n.",
        "OBJ": b"\x80\x02(cposix\nsystem\n" + argument + b"o.",
        "NEWOBJ": b"\x80\x02csubprocess\nPopen\n" + argument + b"\x85\x81.",
        "NEWOBJ_EX": stack_global("subprocess", "Popen", argument + b"\x85}\x92."),
        "NEWOBJ of ours": b"\x80\x02cnumpy\ndtype\nX\x02\x00\x00\x00f4\x85\x81.",
        "dotted": stack_global("numpy", "core.multiarray.os.system", argument + b"\x85R."),
        "dotted numpy": stack_global("numpy._core.multiarray", "_reconstruct.__globals__", b"."),
        "dotted haiku": stack_global("haiku._src.data_structures", "FlatMapping.__init__", b"."),
        "number for a name": b"\x80\x04" + text("os") + b"K\x01\x93.",
        "list for a name": b"\x80\x04]" + text("os") + b"\x93.",
        "reconstructor": call("copyreg", "_reconstructor", 1, 2, 3),
        "partial": call("functools", "partial", code),
        "attrgetter": call("operator", "attrgetter", "system"),
        "methodcaller": call("operator", "methodcaller", "system", shell),
        "import_module": call("importlib", "import_module", "os"),
        "numpy.load": call("numpy", "load", str(sentinel)),
        "runstring": call("numpy.testing._private.utils", "runstring", code, {}),
        "f2py": call("numpy.f2py.crackfortran", "getlincoef", code, {}),
        "fromfile": call("numpy", "fromfile", "/etc/passwd"),
        "memmap": call("numpy", "memmap", str(sentinel), "f4", "w+"),
        "pickle.loads": call("pickle", "loads", pickle.dumps(evil)),
        "torch.load": call("torch.serialization", "load", str(sentinel)),
        "codec": call("_codecs", "encode", "a", "rot13"),
        "decode": call("_codecs", "decode", b"a", "zip"),
        "dill os": b"\x80\x02cdill._dill\n_get_attr\ncdill._dill\n_import_module\nX\x02\x00\x00\x00os\x85R"
        b"X\x06\x00\x00\x00system\x86R" + argument + b"\x85R.",
        "dill attribute": call("dill._dill", "_get_attr", "a", "format"),
        "dill eval": call("dill._dill", "_eval_repr", code),
        "dill code": call("dill._dill", "_create_code", code),
        "dill array": call("dill._dill", "_create_array", "f", (), ()),
        "array of a string": pickle.dumps(Evil(array.__reduce__()[0], ("ndarray", (0,), b"b"), state), 4),
        "memoised": b"\x80\x02cposix\nsystem\nq\x000h\x00" + argument + b"\x85R.",
        "persistent": b"\x80\x02P" + line + b".",
        "persistent in binary": b"\x80\x02" + argument + b"Q.",
        "extension": b"\x80\x02\x82\xf0" + argument + b"\x85R.",
        "out-of-band buffer": b"\x80\x05\x97.",
        "set": b"\x80\x04\x8f.",
        "class as a value": b"\x80\x02cnumpy\nndarray\n.",
        "dtype as a value": b"\x80\x02cnumpy\ndtype\nX\x02\x00\x00\x00f4\x85R.",
        "call of a class": b"\x80\x02cnumpy\nndarray\n)R.",
        "array without content": b"\x80\x03cnumpy.core.multiarray\n_reconstruct\n"
        b"cnumpy\nndarray\nK\x00\x85C\x01b\x87R.",
        "reconstruct of a function": call("numpy._core.multiarray", "_reconstruct", "a", (0,), b"b"),
        "mapping of a list": call("haiku._src.data_structures", "FlatMapping", [("a", 1)]),
    }


NAMES = sorted(attacks("x"))


@pytest.fixture
def sentinel(tmp_path):
    return tmp_path / "sentinel"


@pytest.fixture
def extension():
    """Prime Python's extension cache with os.system, which EXT1 then yields without a look-up."""
    copyreg.add_extension("posix", "system", 0xF0)
    pickle.loads(b"\x80\x02\x82\xf0.")
    yield
    copyreg.remove_extension("posix", "system", 0xF0)
    copyreg.clear_extension_cache()


def refused(path):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is looked at below
        read_pickle(path)
    message = str(caught.value)
    assert message.isprintable()
    assert message.startswith(f"source={str(path)!r}: ")
    assert "; pass a file the authors published" in message
    return message


def test_the_attacks_would_work_on_python_itself(sentinel, extension):
    for name in ("os.system 0", "os.system 4", "builtins.eval", "INST", "OBJ", "memoised", "extension", "BUILD"):
        try:
            pickle.loads(attacks(sentinel)[name])
        except TypeError:  # the class of "BUILD" takes no number; the call was made
            assert name == "BUILD"
        assert sentinel.exists(), name
        sentinel.unlink()


@pytest.mark.parametrize("name", NAMES)
def test_attacks_are_refused_and_not_run(tmp_path, sentinel, extension, name):
    refused(written(tmp_path, attacks(sentinel)[name]))
    assert not sentinel.exists()


def test_stand_ins_are_inert_without_the_check_of_opcodes(tmp_path, sentinel, monkeypatch):
    monkeypatch.setattr(haiku, "_check_opcodes", lambda content: None)
    for name, content in attacks(sentinel).items():
        if name != "extension":  # comes without a look-up when Python's cache is primed: the check is for that
            refused(written(tmp_path, content))
            assert not sentinel.exists(), name
    assert not hasattr(haiku._NDARRAY, "__dict__")


def test_the_reason_is_said(tmp_path):
    assert "it names posix.system" in refused(written(tmp_path, attacks("x")["os.system 2"]))
    assert "it has the opcode INST" in refused(written(tmp_path, attacks("x")["INST"]))
    assert "it has the opcode EXT1" in refused(written(tmp_path, attacks("x")["extension"]))
    assert "it names os.system" in refused(written(tmp_path, attacks("x")["dill os"]))
    assert "no module" in refused(written(tmp_path, attacks("x")["dill attribute"]))
    assert "in a way numpy does not" in refused(written(tmp_path, attacks("x")["dill array"]))
    assert "not a numpy array" in refused(written(tmp_path, attacks("x")["array of a string"]))
    assert "it names a\\x1b[31m.b" in refused(written(tmp_path, call("a\x1b[31m", "b")))
    assert len(refused(written(tmp_path, call("a" * 9999, "b")))) < 500
