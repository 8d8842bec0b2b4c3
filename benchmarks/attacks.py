"""Attacks on everything we read: what each file, name or number tries, and what is promised against it.

An attack prepares files in an empty folder and gives a command line, or a call. It *held* if what is promised came
true: one line on standard error that names the file or argument, or the right answer; nothing was run, nothing waited,
no control character was printed, and no more memory taken than a small model's. Used by ``python -m benchmarks.faults``
and by the tests.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import logging
import os
import pickle
import random
import re
import resource
import shutil
import signal
import socket
import struct
import sys
import tarfile
import tempfile
import threading
import time
import types
import warnings
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import normfree

REFUSED = "one line that names it"
WORKS = "the right answer"
SECONDS = 60
"""After which an attack counts as a hang; all take seconds, most milliseconds."""
MEMORY = 2**30
"""Bytes of the process's largest memory that an attack may add."""
CANARY = "code_was_run"

SMALL = {"num_classes": 10, "in_channels": 1, "depths": [1, 1, 1, 1], "widths": [8, 8, 16, 16], "stem": "cifar"}
ESCAPES = "\x1b]0;owned\x07\x1b[2J\x9b31m"
ACTING = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


@dataclass(frozen=True)
class Attack:
    """One attack.

    Attributes:
        kind: which promise it tries.
        name: of the attack, distinct.
        promise: :data:`REFUSED` or :data:`WORKS`.
        act: prepares a folder; returns the words of a command, or a call.
        names: what the line has to name.
    """

    kind: str
    name: str
    promise: str
    act: Callable[[Path], list[str] | Callable[[], Any]]
    names: str = ""


ATTACKS: dict[str, Attack] = {}


def attack(kind: str, name: str, act: Callable[[Path], Any], names: str = "", promise: str = REFUSED) -> None:
    """Enter an attack."""
    assert name not in ATTACKS, name
    ATTACKS[name] = Attack(kind, name, promise, act, names)


class Hang(BaseException):
    """An attack that does not end."""


@contextlib.contextmanager
def alarm(seconds: float) -> Iterator[list[int]]:
    """Raise :class:`Hang` after so many seconds, and each second after, for a finalizer may lose one; lists them."""
    rung: list[int] = []

    def ring(number: int, frame: Any) -> None:
        rung.append(number)
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield rung
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def outcome(attack: Attack, folder: Path) -> str:
    """Carry out an attack in an empty folder; "held", or what went wrong."""
    from normfree.cli import main

    printed, told = io.StringIO(), io.StringIO()
    code: int | None = None
    rung: list[int] = []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    here = Path.cwd()
    try:
        os.chdir(folder)
        with alarm(SECONDS) as rung, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            act = attack.act(folder)
            with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(told):
                if callable(act):
                    try:
                        act()
                        code = 0
                    except ValueError as error:
                        code = 2
                        print(f"normfree: {error}", file=sys.stderr)
                else:
                    code = main(act)
    except Hang:
        return "hang"
    except BaseException as error:  # whatever it is, a person would have seen it
        return f"traceback ({type(error).__name__}: {str(error)[:80]!r})"
    finally:
        os.chdir(here)
    if rung:
        return "hang"
    if any(folder.rglob(CANARY)):
        return "code was run"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    if grown > MEMORY:
        return f"memory ({grown / 2**30:.1f} GiB)"
    line = told.getvalue()
    if ACTING.search(line) or ACTING.search(printed.getvalue()):
        return "control characters"
    if code == 3 or "Traceback" in line:
        return f"traceback ({line.strip()[:120]!r})"
    if attack.promise == WORKS:
        return "held" if code == 0 else f"refused what is right ({line.strip()[:200]!r})"
    if code == 0:
        return "silently wrong"
    if line.count("\n") != 1 or len(line) > 520:
        return f"not one short line ({len(line)} characters, {line.count(chr(10))} lines)"
    return "held" if attack.names in line else f"does not name {attack.names!r} ({line.strip()[:200]!r})"


# --- what is attacked ---------------------------------------------------------------------------------------------


@dataclass
class Ground:
    """What attacks take a copy of, made once: a run of a few steps, and models of ours."""

    folder: Path | None = None


GROUND = Ground()
RUN_MODEL = "nf_resnet50:depths=(1,1,1,1),widths=(8,8,16,16),stem=cifar,alpha=0.5,skipinit_gain=1"


def prepare(folder: Path) -> None:
    """Train the run whose files are attacked, in a folder that stays."""
    from normfree.cli import main

    GROUND.folder = folder
    torch.manual_seed(0)
    normfree.save(normfree.create_model("nf_resnet50", **SMALL), folder / "model.safetensors")
    words = train_words(folder / "run")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert main(words) == 0


def train_words(out: Path) -> list[str]:
    """The command of the run."""
    options = {
        "--model": RUN_MODEL,
        "--epochs": 2,
        "--optimizer.warmup-epochs": 1,
        "--batch-size": 128,
        "--signal-every": 0,
        "--log-every": 1,
        "--checkpoint-every": 4,
        "--precision": "fp32",
        "--limit-eval-steps": 1,
        "--out": out,
    }
    return ["train", "digits", *(str(word) for pair in options.items() for word in pair)]


def run_in(folder: Path) -> Path:
    """A copy of the run."""
    assert GROUND.folder is not None, "prepare comes first"
    return Path(shutil.copytree(GROUND.folder / "run", folder / "run"))


def unfinished_in(folder: Path) -> Path:
    """A copy of the run without its metrics, as if it had been stopped: it goes on from its checkpoint."""
    run = run_in(folder)
    (run / "metrics.json").unlink()
    return run


def model_in(folder: Path, name: str = "model.safetensors") -> Path:
    """A copy of the model."""
    assert GROUND.folder is not None, "prepare comes first"
    return Path(shutil.copy(GROUND.folder / "model.safetensors", folder / name))


def image_in(folder: Path, name: str = "image.png", content: bytes | None = None) -> Path:
    """An image, or something else of its name."""
    from PIL import Image

    if content is None:
        file = io.BytesIO()
        Image.effect_noise((8, 8), 60).save(file, "PNG")
        content = file.getvalue()
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    return folder / name


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], notes: dict[str, str]) -> str:
    """A safetensors file with these notes."""
    from safetensors.torch import save_file

    save_file(tensors, path, notes)
    return str(path)


class Exploit:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> Any:
        return (os.system, (f"touch {CANARY}",))


# --- 1: no code from files ----------------------------------------------------------------------------------------

EVIL = f"open({CANARY!r}, 'w').close()\n"


def converted_in(folder: Path, source: str | None, **changes: Any) -> str:
    """A converted checkpoint whose record names a source, or has other changes."""
    from torch import nn

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    converted = normfree.convert(model, torch.randn(4, 1, 8, 8))
    record = {**converted.conversion.to_dict(), "source": source, **changes}  # type: ignore[union-attr, operator]
    notes = {"normfree.conversion": json.dumps(record)}
    return write_tensors(folder / "c.safetensors", dict(converted.state_dict()), notes)


FORGED_SOURCES = {
    "a factory": "nets.py:net",
    "a factory by an absolute path": "{folder}/nets.py:net",
    "a factory above": "../nets.py:net",
    "a hub model of timm": "timm:hf-hub:someone/evil",
    "a path for timm": "timm:./nets.py",
    "a path for torchvision": "torchvision:nets.py",
    "another checkpoint": "other.safetensors",
    "itself": "c.safetensors",
    "a folder": "folder",
    "a module": "os:system",
    "nothing": "",
    "a name that is no model": "nf_resnet51",
    "escapes": ESCAPES,
    "a long name": "x" * 100_000,
    "overrides that are code": "nf_resnet50:width=__import__('os').system('touch code_was_run')",
    "overrides that are deep": "nf_resnet50:width=" + "(" * 5000,
    "a large torchvision model": "torchvision:vit_h_14",
    "a large model of ours": "nf_resnet50:width=4096",
    "a deep model of ours": "nf_resnet50:depths=(1000000000,1,1,1)",
}


def forged_source(source: str) -> Callable[[Path], list[str]]:
    """A command on a converted checkpoint that names a source."""

    def act(folder: Path) -> list[str]:
        path = converted_in(folder, source.format(folder=folder) if "{folder}" in source else source)
        (folder / "nets.py").write_text(EVIL)
        (folder / "folder").mkdir()
        model_in(folder, "other.safetensors")
        return ["spp", path]

    return act


for title, source in FORGED_SOURCES.items():
    attack("code", f"a converted file names {title}", forged_source(source), "c.safetensors")


def trained_by(word: Any, classes: Any, command: tuple[str, ...] = ("spp", "t.safetensors")) -> Any:
    """A command on weights that name what `normfree train` built their model by."""

    def act(folder: Path) -> list[str]:
        note = json.dumps({"model": word, "num_classes": classes})
        write_tensors(folder / "t.safetensors", {"fc.weight": torch.zeros(3, 4)}, {"normfree.built_by": note})
        (folder / "nets.py").write_text(EVIL)
        return list(command)

    return act


for title, (word, classes) in {
    "a factory": ("nets.py:net", 3),
    "a hub model of timm": ("timm:hf-hub:someone/evil", 3),
    "a large torchvision model": ("torchvision:vit_h_14", 3),
    "a billion classes": ("torchvision:squeezenet1_0", 10**9),
    "no classes": ("torchvision:squeezenet1_0", 0),
    "a number": (7, 3),
    "itself": ("t.safetensors", 3),
    "escapes": (ESCAPES, 3),
    "arguments that are code": ("torchvision:squeezenet1_0:dropout=__import__('os').system('touch code_was_run')", 3),
}.items():
    attack("code", f"trained weights name {title}", trained_by(word, classes), "t.safetensors")
attack(
    "code",
    "normfree evaluate finds the factory that trained weights name",
    trained_by("nets.py:net", 3, ("evaluate", "t.safetensors", "--source", "digits")),
    "t.safetensors",
)


def settings_naming(option: str) -> Callable[[Path], list[str]]:
    """A settings file that names code."""

    def act(folder: Path) -> list[str]:
        (folder / "nets.py").write_text(EVIL)
        model = "nets.py:net" if option == "model" else "kept.safetensors"
        (folder / "own.yaml").write_text(f"model: {model}\noriginal: nets.py:net\n")
        return ["train", "digits", "--config", "own.yaml", "--out", "run"]

    return act


for option in ("model", "original"):
    attack("code", f"a settings file names code as its {option}", settings_naming(option), "own.yaml")


def settings_with(**settings: str) -> Callable[[Path], list[str]]:
    """A run's settings that name what may only be named by a person; a file with them marks what was followed."""

    def act(folder: Path) -> list[str]:
        run = run_in(folder)
        document = json.loads((run / "config.json").read_text())
        for name, value in settings.items():
            part = document["config"]["data"] if name in document["config"]["data"] else document["config"]
            part[name] = value.replace("FOLDER", str(folder / CANARY))
        (folder / "own.json").write_text(json.dumps(document))
        return ["train", "--config", "own.json"]

    return act


for title, settings in {
    "an address as its data": {"source": "http://127.0.0.1:9/train-0.tar", "out": "new"},
    "a folder to write to": {"out": "FOLDER"},
    "a folder above": {"out": "../" + CANARY},
    "a folder to keep images in": {"cache_folder": "FOLDER", "out": "new"},
}.items():
    attack("code", f"settings name {title}", settings_with(**settings), "own.json")


def linked(name: str) -> Callable[[Path], list[str]]:
    """Going on with a run in whose folder a link leads out of it; what is written by it marks what was followed."""

    def act(folder: Path) -> list[str]:
        place = unfinished_in(folder) / name
        if place.is_dir():
            shutil.move(place, folder / "elsewhere")
            place.symlink_to("../elsewhere")
        else:
            place.unlink(missing_ok=True)
            place.symlink_to(f"../{CANARY}")
        return train_words(Path("run"))

    return act


for name in ("model.safetensors", "metrics.json", "train.csv", "report.html", ".lock", "checkpoints", "tensorboard"):
    attack("code", f"a run's {name} is a link out of its folder", linked(name), name)


def behind_a_link(folder: Path) -> list[str]:
    """Settings that name a folder below the current one, by a link that lies beside them and leads out of it."""
    (folder / "here").mkdir()
    (folder / "here/link").symlink_to("..")
    words = settings_with(out=f"link/{CANARY}")(folder / "here")
    os.chdir(folder / "here")
    return words


attack("code", "settings name a folder behind a link", behind_a_link, "own.json")


def file_of_checkpoints(folder: Path) -> list[str]:
    """Going on with a run whose folder of checkpoints is a file."""
    run = unfinished_in(folder)
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").write_text("")
    return train_words(Path("run"))


attack("hang", "train: a file as run/checkpoints", file_of_checkpoints, "checkpoints")


def command_on(*words: str) -> Callable[[Path], list[str]]:
    """A command on a converted checkpoint whose factory lies beside it."""

    def act(folder: Path) -> list[str]:
        converted_in(folder, "nets.py:net")
        (folder / "nets.py").write_text(EVIL)
        image_in(folder)
        return [word.replace("MODEL", "c.safetensors") for word in words]

    return act


for command in (
    ("doctor", "MODEL"),
    ("benchmark", "MODEL"),
    ("export", "MODEL", "--out", "m.onnx"),
    ("convert", "MODEL", "--out", "m.safetensors"),
    ("evaluate", "MODEL", "--source", "digits"),
    ("predict", "MODEL", "image.png"),
):
    attack("code", f"normfree {command[0]} finds the factory beside the weights", command_on(*command), "c.safetensors")


def pickled(name: str, wrap: Callable[[bytes, Path], None], words: list[str]) -> None:
    """A pickle that runs code, under a name."""

    def act(folder: Path) -> list[str]:
        image_in(folder)
        wrap(pickle.dumps(Exploit()), folder / name)
        return [word.replace("FILE", name) for word in words]

    attack("code", f"{' '.join(words[:1])}: a pickle as {name}", act, name)


def as_pt2(content: bytes, path: Path) -> None:
    """A torch.export archive whose sample inputs are the pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        for entry in ("archive_format", "models/model.json", "data/sample_inputs/model.pt", "data/weights/model.pt"):
            archive.writestr(f"archive/{entry}", content if entry.endswith(".pt") else "pt2")


def as_is(content: bytes, path: Path) -> None:
    """The pickle itself."""
    path.write_bytes(content)


def as_torch(content: bytes, path: Path) -> None:
    """A file of torch.save that runs code."""
    torch.save(Exploit(), path)


for wrap in (as_pt2, as_is, as_torch):
    for name, words in {
        "m.pt2": ["evaluate", "FILE", "--source", "digits"],
        "m.safetensors": ["spp", "FILE"],
        "m.onnx": ["predict", "FILE", "image.png"],
        "m.pt": ["evaluate", "FILE", "--source", "digits"],
        "weights.bin": ["convert", "torchvision:resnet18", "--weights", "FILE", "--out", "o.safetensors"],
    }.items():
        if wrap is not as_pt2 or name == "m.pt2":
            title = {as_pt2: "archive.", as_is: "plain.", as_torch: "torch."}[wrap]
            pickled(title + name, wrap, words)


def modules_beside(folder: Path) -> list[str]:
    """Modules named as packages that are imported late, beside the weights."""
    for name in ("timm", "datasets", "onnxruntime", "lightning", "torchmetrics", "plotly", "nets", "model"):
        (folder / f"{name}.py").write_text(EVIL)
    model_in(folder)
    return ["evaluate", "model.safetensors", "--source", "digits", "--limit-eval-steps", "1"]


attack("code", "packages' names beside the weights", modules_beside, promise=WORKS)


def state_pickle(folder: Path) -> list[str]:
    """A training state that runs code, with the right checksums."""
    run = run_in(folder)
    rewritten_state(run, lambda state: Exploit())
    return train_words(run)


def script_beside(folder: Path) -> list[str]:
    """A loading script in a data folder of the hub's form."""
    (folder / "data").mkdir()
    (folder / "data" / "data.py").write_text(EVIL)
    model_in(folder)
    return ["evaluate", "model.safetensors", "--source", f"hub:{folder / 'data'}"]


attack("code", "a script in a folder of data", script_beside)


# --- 2: bombs and hangs -------------------------------------------------------------------------------------------


def noted(**config: Any) -> Callable[[Path], list[str]]:
    """A file of a few bytes that describes some model."""

    def act(folder: Path) -> list[str]:
        note = json.dumps({"name": "nf_resnet50", "num_classes": 10, "in_channels": 3, **config})
        return ["spp", write_tensors(folder / "m.safetensors", {"a": torch.zeros(1)}, {"normfree": note})]

    return act


for title, config in {
    "a width of 4096": {"width": 4096},
    "a width of 1e18": {"width": 1e18},
    "a width of 1e308": {"width": 1e308},
    "widths of 10**9": {"widths": [10**9] * 4},
    "10**9 blocks": {"depths": [10**9, 1, 1, 1]},
    "10**18 blocks": {"depths": 10**18},
    "10**12 classes": {"num_classes": 10**12},
    "10**12 channels": {"in_channels": 10**12},
    "a name of a list": {"name": ["nf_resnet50"]},
    "a name of escapes": {"name": ESCAPES},
    "a name of a megabyte": {"name": "x" * 10**6},
    "an activation of a mapping": {"activation": {"a": 1}},
    "no number of classes": {"num_classes": None},
    "a negative width": {"widths": [-1, 1, 1, 1]},
    "depths of words": {"depths": ["a", "b"]},
    "depths of no end": {"depths": [[1]]},
    "another override": {"__class__": "x"},
    "a group of zero": {"group_size": 0},
}.items():
    attack("bomb", f"a note of {title}", noted(**config), "m.safetensors")


def noted_text(text: str) -> Callable[[Path], list[str]]:
    """A file whose note is a text."""
    return lambda folder: [
        "spp",
        write_tensors(folder / "m.safetensors", {"a": torch.zeros(1)}, {"normfree": text}),
    ]


for title, text in {
    "no JSON": "{",
    "JSON nested 100,000 times": "[" * 100_000,
    "a list": "[]",
    "a number of 5,000 digits": '{"name": ' + "9" * 5000 + "}",
    "not a number": '{"name": "nf_resnet50", "width": NaN}',
    "infinity": '{"name": "nf_resnet50", "width": 1e999}',
}.items():
    attack("damage", f"a note of {title}", noted_text(text), "m.safetensors")


def header_of(header: bytes, length: int | None = None) -> Callable[[Path], list[str]]:
    """A safetensors file of a header."""

    def act(folder: Path) -> list[str]:
        size = struct.pack("<Q", len(header) if length is None else length)
        (folder / "m.safetensors").write_bytes(size + header)
        return ["evaluate", "m.safetensors", "--source", "digits"]

    return act


EMPTY_TENSOR = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
for title, header, length in (
    ("of 2**60 bytes", b"{}", 2**60),
    ("cut off", b'{"a": {"dtype": "F32"', None),
    ("nested 10,000 times", b"[" * 10_000, None),
    ("of a tensor that is not there", b'{"a":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4]}}', None),
    (
        "of overlapping tensors",
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        None,
    ),
    ("of an unknown dtype", b'{"a":{"dtype":"F1024","shape":[0],"data_offsets":[0,0]}}', None),
    ("of no bytes", b"", 0),
    ("of 250,000 tensors", json.dumps({f"t{i}": EMPTY_TENSOR for i in range(250_000)}).encode(), None),
):
    attack("bomb", f"a safetensors header {title}", header_of(header, length), "m.safetensors")


def make_special(kind: str, path: Path) -> None:
    """A named pipe, device, socket, folder, or link to one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    if kind == "named pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "socket":
        here = Path.cwd()
        os.chdir(path.parent)  # a socket's address is short
        try:
            socket.socket(socket.AF_UNIX).bind(path.name)
        finally:
            os.chdir(here)
    else:
        path.mkdir()


def special(kind: str, place: str, words: list[str], ready: Callable[[Path], Any]) -> None:
    """A special file at a place that a command reads."""

    def act(folder: Path) -> list[str]:
        ready(folder)
        make_special(kind, folder / place)
        return words

    attack("hang", f"{words[0]}: a {kind} as {place}", act, Path(place).name)


def nothing(folder: Path) -> None:
    """Needs nothing beside it."""


def data_in(folder: Path) -> None:
    """A folder of images, and a model."""
    model_in(folder)
    for number in range(4):
        image_in(folder, f"data/test/{number % 2}/{number}.png")


for kind in ("named pipe", "device", "socket", "folder"):
    special(kind, "m.onnx", ["predict", "m.onnx", "image.png"], image_in)
    special(kind, "image.png", ["predict", "model.safetensors", "image.png"], model_in)
    special(kind, "own.yaml", ["train", "digits", "--config", "own.yaml"], nothing)
    if kind != "folder":  # a folder may be a run
        special(kind, "m.safetensors", ["spp", "m.safetensors"], nothing)
        special(kind, "nets.py", ["spp", "nets.py:net"], nothing)
        special(
            kind, "w.bin", ["convert", "torchvision:resnet18", "--weights", "w.bin", "--out", "o.safetensors"], nothing
        )
        special(kind, "data.parquet", ["evaluate", "model.safetensors", "--source", "data.parquet"], model_in)
        special(kind, "data.tar", ["evaluate", "model.safetensors", "--source", "data.tar"], model_in)
        special(
            kind,
            "data/test/0/bad.png",
            ["evaluate", "model.safetensors", "--source", "data", "--on-bad-image", "error", "--image-size", "8"],
            data_in,
        )
    for name in ("config.json", "train.csv", "eval.csv", "metrics.json"):
        special(kind, f"run/{name}", train_words(Path("run")), run_in if name == "metrics.json" else unfinished_in)


def bytes_as_image(content: Callable[[], bytes], suffix: str) -> Callable[[Path], list[str]]:
    """An image of some bytes, to predict."""

    def act(folder: Path) -> list[str]:
        model_in(folder)
        return ["predict", "model.safetensors", str(image_in(folder, f"image{suffix}", content()).name)]

    return act


def png_of(width: int, height: int) -> bytes:
    """A PNG whose header promises some size."""
    import zlib

    header = chunk_of(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk_of(b"IDAT", zlib.compress(bytes(64))) + chunk_of(b"IEND", b"")


def scans_of(count: int) -> bytes:
    """A progressive JPEG one of whose scans comes so often."""
    from PIL import Image

    file = io.BytesIO()
    Image.new("L", (512, 512), 200).save(file, "JPEG", progressive=True)
    first, last = (file.getvalue().rindex(b"\xff\xda"), file.getvalue().rindex(b"\xff\xd9"))
    return file.getvalue()[:first] + file.getvalue()[first:last] * count + b"\xff\xd9"


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(code_was_run) (w) file closefile showpage\n"
for title, content, suffix in (
    ("PostScript", lambda: POSTSCRIPT, ".eps"),
    ("PostScript called a PNG", lambda: POSTSCRIPT, ".png"),
    (
        "PostScript with a preview",
        lambda: b"\xc5\xd0\xd3\xc6" + struct.pack("<6I", 32, 99, 0, 0, 0, 0) + POSTSCRIPT,
        ".jpg",
    ),
    ("60,000 by 60,000 pixels", lambda: png_of(60_000, 60_000), ".png"),
    ("10,000 by 10,000 pixels", lambda: png_of(10_000, 10_000), ".png"),
    ("2**31 by 1 pixels", lambda: png_of(2**31 - 1, 1), ".png"),
    ("no pixels", lambda: png_of(0, 0), ".png"),
    ("HTML", lambda: b"<html>404</html>", ".jpg"),
    ("SVG", lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", ".png"),
    ("nothing", lambda: b"", ".png"),
    ("noise", lambda: bytes(range(256)) * 8, ".webp"),
    ("3,000 scans", lambda: scans_of(3_000), ".jpg"),
    ("a JPEG's first bytes", lambda: b"\xff\xd8\xff\xe0\x00\x10JFIF\x00", ".jpg"),
):
    attack("bomb", f"an image of {title}", bytes_as_image(content, suffix), "image")


WEBP = b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8X" + struct.pack("<I", 10) + b"\x10\0\0\0"


def chunk_of(kind: bytes, body: bytes) -> bytes:
    """A chunk of a PNG."""
    import zlib

    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_with(*chunks: bytes, depth: int = 8, color: int = 0) -> bytes:
    """A black PNG of 8 by 8 pixels, with more chunks."""
    import zlib

    parts = [chunk_of(b"IHDR", struct.pack(">IIBBBBB", 8, 8, depth, color, 0, 0, 0)), *chunks]
    parts += [chunk_of(b"IDAT", zlib.compress(bytes(72))), chunk_of(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def text_bomb(kind: bytes, before: bytes) -> Callable[[], bytes]:
    """A PNG of whose text a quarter of a gigabyte is compressed."""
    import zlib

    return lambda: png_with(chunk_of(kind, before + zlib.compress(bytes(2**28))))


def tiff_of(tags: dict[int, int], pixels: int = 64) -> bytes:
    """A TIFF of 8 by 8 grey pixels, with other values of some tags."""
    tags = {256: 8, 257: 8, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 279: 64, **tags}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4 + pixels)


def gif_of(width: int, height: int, data: bytes = b"\x02\x02\x4c\x01\x00") -> bytes:
    """A GIF of some size."""
    head = b"GIF89a" + struct.pack("<HH", width, height) + b"\x80\0\0\0\0\0\xff\xff\xff"
    return head + b"," + struct.pack("<4H", 0, 0, width, height) + b"\0" + data + b";"


def bmp_of(width: int, height: int, bits: int = 24, packed: int = 0) -> bytes:
    """A BMP's header."""
    return (
        b"BM"
        + struct.pack("<IHHI", 54, 0, 0, 54)
        + struct.pack("<IiiHH6I", 40, width, height, 1, bits, packed, 0, 0, 0, 0, 0)
    )


def jpeg_of(width: int, height: int) -> bytes:
    """A JPEG of 8 by 8 pixels that promises others."""
    from PIL import Image

    file = io.BytesIO()
    Image.new("L", (8, 8)).save(file, "JPEG")
    content = file.getvalue()
    place = content.index(b"\xff\xc0") + 5
    return content[:place] + struct.pack(">HH", height, width) + content[place + 4 :]


for title, content, suffix in (
    ("a PNG with compressed text of 256 MB", text_bomb(b"zTXt", b"a\0\0"), ".png"),
    ("a PNG with other compressed text of 256 MB", text_bomb(b"iTXt", b"a\0\1\0\0\0"), ".png"),
    ("a PNG with a palette that it does not have", lambda: png_with(color=3), ".png"),
    ("a PNG of three bits", lambda: png_with(depth=3), ".png"),
    ("a PNG with a chunk of 2 GB", lambda: png_with()[:33] + struct.pack(">I", 2**31 - 1) + b"IDAT", ".png"),
    ("a TIFF whose first page is its next", lambda: b"II*\0\x08\0\0\0\0\0\x08\0\0\0", ".tif"),
    ("a TIFF of 80,000 by 80,000 pixels", lambda: tiff_of({256: 80_000, 257: 80_000, 259: 8}), ".tif"),
    ("a TIFF of 65,535 samples a pixel", lambda: tiff_of({277: 65_535}), ".tif"),
    ("a TIFF whose pixels lie behind its end", lambda: tiff_of({273: 2**31}), ".tif"),
    ("a TIFF in an unknown compression", lambda: tiff_of({259: 34_712}), ".tif"),
    ("a GIF of 65,535 by 65,535 pixels", lambda: gif_of(65_535, 65_535), ".gif"),
    ("a GIF whose codes do not end", lambda: gif_of(8, 8, b"\x0c\xff" + b"\xff" * 255 + b"\0"), ".gif"),
    ("a BMP of 100,000 by 100,000 pixels", lambda: bmp_of(100_000, 100_000), ".bmp"),
    ("a BMP of minus 2**31 rows", lambda: bmp_of(8, -(2**31)), ".bmp"),
    ("a BMP of runs of 81 million pixels", lambda: bmp_of(9000, 9000, 8, 1) + b"\0\1", ".bmp"),
    ("a BMP of 64 bits", lambda: bmp_of(8, 8, 64), ".bmp"),
    ("a PPM of 10**16 pixels", lambda: b"P6 99999999 99999999 255\n", ".ppm"),
    ("a PPM with a width of a million digits", lambda: b"P6 " + b"9" * 10**6, ".ppm"),
    ("a PPM with a comment of a megabyte", lambda: b"P6 #" + b"x" * 10**6 + b"\n8 8 255\n", ".ppm"),
    ("a PPM with a pixel of a million digits", lambda: b"P3 8 8 255\n" + b"9" * 10**6, ".ppm"),
    ("a PGM whose white is zero", lambda: b"P5 8 8 0\n" + bytes(64), ".pgm"),
    ("a PFM", lambda: b"Pf 8 8 -1.0\n" + bytes(256), ".pfm"),
    ("a JPEG of 65,500 by 65,500 pixels", lambda: jpeg_of(65_500, 65_500), ".jpg"),
    ("a JPEG of no rows", lambda: jpeg_of(8, 0), ".jpg"),
    ("a WebP of 16 million by 16 million pixels", lambda: WEBP + b"\xff" * 6, ".webp"),
    ("an archive called a PNG", lambda: b"PK\3\4" + bytes(100), ".png"),
    ("a PDF called a PNG", lambda: b"%PDF-1.4", ".png"),
    ("a program called a PNG", lambda: b"\x7fELF" + bytes(100), ".png"),
    ("a FITS called a PNG", lambda: b"SIMPLE  =                    T", ".png"),
    ("a PSD called a TIFF", lambda: b"8BPS" + bytes(99), ".tif"),
    ("a WMF called a BMP", lambda: b"\xd7\xcd\xc6\x9a" + bytes(99), ".bmp"),
    ("an XBM called a BMP", lambda: b"#define a_width 8\n#define a_height 8\n", ".bmp"),
    ("a DDS called a PNG", lambda: b"DDS " + bytes(200), ".png"),
):
    attack("bomb", f"an image of {title}", bytes_as_image(content, suffix), "image")


def archive_bomb(shape: tuple[int, ...], content: bytes) -> Callable[[Path], Any]:
    """An archive of arrays for load_haiku_weights."""

    def act(folder: Path) -> Any:
        import numpy as np

        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
        with zipfile.ZipFile(folder / "w.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            archive.writestr("params/a/w.npy", header.getvalue() + content)
        model = normfree.create_model("nf_resnet50", **SMALL)
        return lambda: normfree.load_haiku_weights(model, folder / "w.npz")

    return act


attack("bomb", "an archive that unpacks to a gigabyte", archive_bomb((2**28,), bytes(2**30)), "w.npz")
attack("bomb", "an array that claims 400 GB", archive_bomb((10**11,), b"abcd"), "w.npz")
attack("bomb", "an array that claims 2**60 rows", archive_bomb((2**60, 2**60), b"abcd"), "w.npz")

SHARED = b")q\x000" + b"".join(b"h%ch%c\x86q%c0" % (i, i, i + 1) for i in range(60)) + b"h<"
for title, content in {
    "that names os.system": b"\x80\x02cos\nsystem\nX\x12\x00\x00\x00touch code_was_run\x85R.",
    "whose key is exponential": b"\x80\x02}" + SHARED + b"K\x01s.",
    "whose dtype is exponential": b"\x80\x02cnumpy\ndtype\n" + SHARED + b"\x85R.",
    "of a list in itself": b"\x80\x02]q\x00h\x00a.",
    "of 2**60 bytes": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 60) + b".",
    "of 2**31 memo entries": b"\x80\x02Nr\xff\xff\xff\x7f.",
    "that is cut off": b"\x80\x02}",
}.items():

    def read(folder: Path, content: bytes = content) -> Any:
        """Official weights of some bytes."""
        (folder / "w.npz").write_bytes(content)
        model = normfree.create_model("nf_resnet50", **SMALL)
        return lambda: normfree.load_haiku_weights(model, folder / "w.npz")

    attack("code" if "os." in title else "bomb", f"official weights of a pickle {title}", read, "w.npz")


SHARED_TUPLES = b"\x80\x02)q\x01" + b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(1, 60))
SHARED_LISTS = b"\x80\x02]q\x01" + b"".join(b"]q%c(h%ch%ce" % (i + 1, i, i) for i in range(1, 60))
COLLIDING = b"".join(b"\x8a\x0c" + (i * (2**61 - 1)).to_bytes(12, "little") + b"K\x01" for i in range(1, 120_000))
ITEMS = [b"\x8a\x0c" + (i * (2**61 - 1)).to_bytes(12, "little") for i in range(1, 60_000)]
IN_A_TENSOR = b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n(c__builtin__\n%b\nctorch\nTensor\n%b\x85NtR."
SLOW = "".join(chr(0x4E00 + i % 20_000) for i in range(400_000)).encode()
PICKLES = {
    "whose key is exponential": SHARED_TUPLES + b"}h<K\x01s.",
    "of lists that share lists": SHARED_LISTS + b"}X\x01\x00\x00\x00ah<s.",
    "of a list in itself": b"\x80\x02}X\x01\x00\x00\x00a]q\x01h\x01as.",
    "of a bytearray of 64 GB": b"\x80\x02c__builtin__\nbytearray\n\x8a\x05\x00\x00\x00\x00\x10\x85R.",
    "of a set whose item is exponential": SHARED_TUPLES + b"c__builtin__\nset\n]h<a\x85R.",
    "of a set that is built whose item is exponential": b"\x80\x04\x8f(" + SHARED_TUPLES[2:] + b"h<\x90.",
    "of 120,000 keys of one hash": b"\x80\x02}(" + COLLIDING + b"u.",
    "of pairs with 60,000 keys of one hash": b"\x80\x02ccollections\nOrderedDict\n]("
    + b"".join(item + b"K\x01\x86" for item in ITEMS)
    + b"e\x85R.",
    "of a bytearray of 8 GB in a tensor": IN_A_TENSOR % (b"bytearray", b"\x8a\x05\x00\x00\x00\x00\x02"),
    "of a set of 60,000 items of one hash in a tensor": IN_A_TENSOR % (b"set", b"](" + b"".join(ITEMS) + b"e"),
    "of text in an encoding of slow code": b"\x80\x02c_codecs\nencode\nX"
    + struct.pack("<I", len(SLOW))
    + SLOW
    + b"X\x08\x00\x00\x00punycode\x86R.",
    "that writes to what it makes": b"\x80\x02ctorch\nSize\n)RK\x00K\x00s.",
}


def write_torch_file(
    path: Path, content: bytes, kind: int = zipfile.ZIP_STORED, numbers: bytes = b"", name: str = "data.pkl"
) -> None:
    """A file as of torch.save, with this pickle."""
    with zipfile.ZipFile(path, "w", kind, compresslevel=1) as archive:
        for member, part in {name: content, "version": b"3\n", "byteorder": b"little", "data/0": numbers}.items():
            archive.writestr(f"archive/{member}", part)


WEIGHTS_OF = ["convert", "torchvision:resnet18", "--weights", "w.pth", "--out", "o.safetensors"]
for title, content in PICKLES.items():

    def weights_of(folder: Path, content: bytes = content) -> list[str]:
        """A state dict of some bytes."""
        write_torch_file(folder / "w.pth", content)
        return WEIGHTS_OF

    def state_of(folder: Path, content: bytes = content) -> list[str]:
        """A training state of some bytes, with the checksums that belong to it."""
        run = run_in(folder)
        rewritten_state(run, lambda state: state, lambda path: write_torch_file(path, content))
        return train_words(run)

    def old_weights_of(folder: Path, content: bytes = content) -> list[str]:
        """A state dict of some bytes, as PyTorch wrote it before 1.6."""
        torch.save({}, folder / "w.pth", _use_new_zipfile_serialization=False)
        old = (folder / "w.pth").read_bytes()
        (folder / "w.pth").write_bytes(old.replace(pickle.dumps({}, 2), content, 1))
        return WEIGHTS_OF

    attack("bomb", f"a state dict of a pickle {title}", weights_of, "w.pth")
    attack("bomb", f"an old state dict of a pickle {title}", old_weights_of, "w.pth")
    attack("bomb", f"a training state of a pickle {title}", state_of, "step_")


def compressed(folder: Path) -> list[str]:
    """A state dict whose numbers are compressed."""
    torch.save({"fc.bias": torch.zeros(1000)}, folder / "one.pth")
    with zipfile.ZipFile(folder / "one.pth") as archive:
        content = next(archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))
    write_torch_file(folder / "w.pth", content, zipfile.ZIP_DEFLATED, bytes(4000))
    return WEIGHTS_OF


attack("bomb", "a state dict that is compressed", compressed, "w.pth")


def in_capitals(folder: Path) -> list[str]:
    """A state dict whose pickle has a name in capitals, which PyTorch finds too."""
    write_torch_file(folder / "w.pth", PICKLES["whose key is exponential"], name="DATA.PKL")
    return WEIGHTS_OF


def twice(folder: Path) -> list[str]:
    """A state dict with two pickles, whose names differ in their case."""
    write_torch_file(folder / "w.pth", b"\x80\x02}.")
    with zipfile.ZipFile(folder / "w.pth", "a") as archive:
        archive.writestr("archive/Data.pkl", PICKLES["whose key is exponential"])
    return WEIGHTS_OF


def before_an_archive(folder: Path) -> list[str]:
    """An old state dict with a sound archive after it: PyTorch reads the beginning, ``zipfile`` the end."""
    old = ATTACKS["an old state dict of a pickle whose key is exponential"].act(folder)
    write_torch_file(folder / "sound.pth", b"\x80\x02}.")
    with open(folder / "w.pth", "ab") as file:
        file.write((folder / "sound.pth").read_bytes())
    assert not callable(old)
    return old


attack("bomb", "a state dict whose pickle has a name in capitals", in_capitals, "w.pth")
attack("bomb", "a state dict of two pickles whose names differ in case", twice, "w.pth")
attack("bomb", "an old state dict with an archive after it", before_an_archive, "w.pth")


def table_in(folder: Path, labels: Any, name: str = "data") -> None:
    """A parquet file of images with labels, and a model."""
    import pyarrow
    from pyarrow import parquet

    model_in(folder)
    (folder / name).mkdir()
    image = image_in(folder).read_bytes()
    for split in ("train", "test"):
        columns = {"image": pyarrow.array([image] * len(labels)), "label": labels}
        parquet.write_table(pyarrow.table(columns), folder / name / f"{split}.parquet")


def labelled(labels: list[Any], kind: str = "") -> Callable[[Path], list[str]]:
    """An evaluation on a table of labels."""

    def act(folder: Path) -> list[str]:
        import pyarrow

        array = pyarrow.array(labels)
        table_in(folder, array.dictionary_encode() if kind == "dictionary" else array.cast(kind) if kind else array)
        return ["evaluate", "model.safetensors", "--source", "data", "--image-size", "8"]

    return act


TEN = [str(number) for number in range(10)]
for title, labels, kind in (
    ("identifiers of 10**9", [10**9 + number for number in range(20)], ""),
    ("identifiers of 10**18", [10**18 + number for number in range(20)], ""),
    ("two thousand identifiers", list(range(2000)), ""),
    ("two thousand words", [f"id-{number}" for number in range(2000)], ""),
    ("fractions", [0.5, 1.5], ""),
    ("lists", [[0], [1]], ""),
    ("bytes", [b"a", b"b"], ""),
    ("nothing", [None, None], ""),
    ("negative numbers", [-1, 0], ""),
):
    attack(
        "bomb" if "ident" in title or "thousand" in title else "wrong",
        f"labels of {title}",
        labelled(labels, kind),
        "label",
    )


def numbers_as_words(folder: Path) -> Callable[[], None]:
    """Labels of eleven numbers, as words."""
    from normfree.data import DataConfig, open_training

    names = [str(number) for number in range(11)]
    table_in(folder, names)

    def opened() -> None:
        found = open_training(DataConfig(source="data", batch_size=1)).class_names
        if found != tuple(names):
            raise RuntimeError(f"the classes are {found}")

    return opened


attack("wrong", "labels of eleven numbers as words", numbers_as_words, promise=WORKS)


def wide(folder: Path) -> list[str]:
    """A parquet file of 20,000 columns."""
    table_in(folder, TEN)
    import pyarrow
    from pyarrow import parquet

    columns = {f"c{number}": pyarrow.array([1]) for number in range(20_000)}
    parquet.write_table(pyarrow.table(columns), folder / "data" / "test.parquet")
    return ["evaluate", "model.safetensors", "--source", "data", "--image-size", "8"]


attack("bomb", "a parquet file of 20,000 columns", wide, "test.parquet")
attack("wrong", "labels of truth values, for ten classes", labelled([True, False]), "the data have 2")


def truth(folder: Path) -> Callable[[], None]:
    """Labels of truth values, of which a split has one."""
    from normfree.data import DataConfig, open_training

    table_in(folder, [True, True])

    def opened() -> None:
        data = open_training(DataConfig(source="data", batch_size=2))
        if data.class_names != ("False", "True") or next(iter(data))[1].tolist() != [1, 1]:
            raise RuntimeError(f"the classes are {data.class_names}")

    return opened


attack("wrong", "labels of one truth value", truth, promise=WORKS)
for kind in ("", "dictionary", "large_string", "string_view"):
    attack("wrong", f"labels of words, {kind or 'plain'}", labelled(TEN, kind), promise=WORKS)


def repeated(folder: Path) -> list[str]:
    """A small parquet file whose two million images are one."""
    import pyarrow
    from pyarrow import parquet

    model_in(folder)
    (folder / "data").mkdir()
    rows = 2**17
    image = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * rows, pyarrow.int32()), [bytes(1000)])
    part = pyarrow.table({"image": image.cast(pyarrow.binary()), "label": [1] * rows})
    with parquet.ParquetWriter(folder / "data" / "test.parquet", part.schema) as file:
        for _ in range(16):
            file.write_table(part)
    return ["evaluate", "model.safetensors", "--source", "data", "--image-size", "8"]


attack("bomb", "a parquet file of one image two million times", repeated, "data")


def damaged_page(split: str, column: str, words: list[str]) -> Callable[[Path], list[str]]:
    """A command on a folder of parquet files, one with a page that does not decode."""

    def act(folder: Path) -> list[str]:
        from pyarrow import parquet

        table_in(folder, list(range(10)))
        file = folder / "data" / f"{split}.parquet"
        shutil.copy(file, folder / "data" / f"{split}-2.parquet")
        place = next(
            part
            for part in map(parquet.read_metadata(file).row_group(0).column, range(2))
            if part.path_in_schema == column
        )
        start = place.dictionary_page_offset or place.data_page_offset
        content = bytearray(file.read_bytes())
        content[start : start + place.total_compressed_size] = b"\xa5" * place.total_compressed_size
        file.write_bytes(content)
        return words

    return act


OWN_DATA = ["train", "digits", "--data.source", "data", "--model", RUN_MODEL, "--out", "out", "--batch-size", "2"]
for column in ("image", "label"):
    for split, words in (
        ("test", ["evaluate", "model.safetensors", "--source", "data"]),
        ("train", ["evaluate", "model.safetensors", "--source", "data", "--split", "train"]),
        ("train", OWN_DATA),
        ("test", OWN_DATA),
        ("train", [*OWN_DATA, "--data.streaming", "True", "--data.workers", "0"]),
        ("train", ["spp", "model.safetensors", "--input", "data"]),
        ("train", ["convert", "torchvision:resnet18", "--input", "data", "--out", "c.safetensors"]),
    ):
        title = f"{words[0]}{' streamed' * ('True' in words)}: a damaged page of the {column} column, {split}"
        attack(
            "damage", title + " named" * ("--split" in words), damaged_page(split, column, words), f"{split}.parquet"
        )


def image_at(path: Callable[[Path], str | None], content: bytes | None = None) -> Callable[[Path], list[str]]:
    """A row of a parquet file whose image is elsewhere."""

    def act(folder: Path) -> list[str]:
        table_in(folder, list(range(10)))
        import pyarrow
        from pyarrow import parquet

        file = folder / "data" / "test.parquet"
        rows = [{"bytes": one, "path": None} for one in parquet.read_table(file).column("image").to_pylist()]
        rows[3] = {"bytes": content, "path": path(folder)}
        parquet.write_table(pyarrow.table({"image": rows, "label": list(range(10))}), file)
        return ["evaluate", "model.safetensors", "--source", "data", "--on-bad-image", "error", "--image-size", "8"]

    return act


def pipe_in(folder: Path) -> str:
    """A named pipe."""
    os.mkfifo(folder / "pipe.png")
    return str(folder / "pipe.png")


for title, path in {
    "nowhere": lambda folder: None,
    "in a file of the system": lambda folder: "/etc/passwd",
    "in a device": lambda folder: "/dev/zero",
    "in a named pipe": pipe_in,
    "in a folder": lambda folder: "/tmp",
    "at an address": lambda folder: "http://127.0.0.1:9/x.png",
    "at an address of a file": lambda folder: "file:///etc/passwd",
    "on the hub": lambda folder: "hf://datasets/someone/something/x.png",
    "in an archive": lambda folder: "zip://a.png::/tmp/x.zip",
    "at a chain of addresses": lambda folder: "simplecache::http://127.0.0.1:9/x",
    "at a name with escapes": lambda folder: f"{ESCAPES}.png",
    "at a name of 100,000 letters": lambda folder: "x" * 100_000,
    "at a name with a zero": lambda folder: "a\0b.png",
    "of no bytes": None,
}.items():
    act = image_at(path) if path is not None else image_at(lambda folder: None, b"")
    attack("hang" if "in a" in title else "damage", f"a parquet file's image {title}", act, "test.parquet")


def shard_with_members(*members: tuple[str, bytes, bytes, str]) -> Callable[[Path], list[str]]:
    """A shard with an example of each class, and other members: a name, content, a type and a link's end."""

    def act(folder: Path) -> list[str]:
        image = image_in(folder).read_bytes()
        own = [(f"{n}.{k}", c, tarfile.REGTYPE, "") for n in range(10) for k, c in (("png", image), ("cls", b"%d" % n))]
        with tarfile.open(folder / "data.tar", "w") as shard:
            for name, content, kind, end in (*members, *own):
                member = tarfile.TarInfo(name)
                member.size, member.type, member.linkname = len(content), kind, end
                shard.addfile(member, io.BytesIO(content))
        model_in(folder)
        return ["evaluate", "model.safetensors", "--source", "data.tar", "--image-size", "8"]

    return act


def example(name: str, image: bytes | None = None, number: bytes = b"1") -> tuple[tuple[str, bytes, bytes, str], ...]:
    """Members of one more example."""
    content = png_with() if image is None else image
    return (f"{name}.png", content, tarfile.REGTYPE, ""), (f"{name}.cls", number, tarfile.REGTYPE, "")


def entry(name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, end: str = "") -> Any:
    """One member."""
    return name, content, kind, end


CODE = f"cos\nsystem\n(S'touch {CANARY}'\ntR.".encode()
for title, members in {
    "a pickle": [entry("0.pickle", CODE)],
    "a pickle as pyd": [entry("0.pyd", CODE)],
    "a pickle as pkl": [entry("0.pkl", CODE)],
    "a link to a file of the system as an image": [
        entry("x.png", b"", tarfile.SYMTYPE, "/etc/passwd"),
        example("x")[1],
    ],
    "a device as an image": [entry("x.png", b"", tarfile.CHRTYPE), example("x")[1]],
    "JSON nested 100,000 times": [*example("x"), entry("x.json", b"[" * 100_000)],
    "JSON that is cut off": [*example("x"), entry("x.json", b"{")],
    "text of no encoding": [*example("x"), entry("x.txt", b"\xff\xfe")],
    "an image without a class": [example("x")[0]],
    "a class without an image": [example("x")[1]],
    "a negative class": example("x", number=b"-5"),
    "a class that the model has not": example("x", number=b"99"),
    "a class of words": example("x", number=b"cat"),
    "a key of its own": [*example("x"), entry("x.__key__", b"k")],
    "a damaged image with escapes in its name": example(ESCAPES, b"no image"),
}.items():
    kind = "code" if "pickle" in title else "damage"
    named = "the data have 100" if "model has not" in title else "data.tar"
    attack(kind, f"a shard with {title}", shard_with_members(*members), named)


def called_as_a_pattern(command: tuple[str, ...], *, read: str = "", other: str = "") -> Callable[[Path], list[str]]:
    """Images of this folder or file, beside another that its name, read as a pattern, stands for."""

    def act(folder: Path) -> list[str]:
        table_in(folder, TEN, read)
        shutil.copytree(folder / read, folder / other)
        for file in (folder / other).iterdir():
            file.write_bytes(b"no parquet")
        return ["evaluate", "model.safetensors", *command, "--image-size", "8", "--split", "train"]

    return act


for title, words in {"file": ("d[1]/train.parquet",), "folder": ("d[1]",)}.items():
    act = called_as_a_pattern(("--source", *words), read="d[1]", other="d1")
    attack("wrong", f"a {title} that is called as a pattern", act, promise=WORKS)
act = called_as_a_pattern(("--source", "hub:d[1]"), read="d[1]", other="d1")
attack("wrong", "a folder of the hub's layout that is called as a pattern", act, "d[1]")


def stray(change: Callable[[Path], Any]) -> Callable[[Path], list[str]]:
    """An evaluation on class folders of images, where something else lies as well."""

    def act(folder: Path) -> list[str]:
        model_in(folder)
        for name in TEN:
            image_in(folder, f"data/{name}/0.png")
        change(folder / "data")
        return ["evaluate", "model.safetensors", "--source", "data", "--image-size", "8", "--split", "train"]

    return act


def write_file(name: str) -> Callable[[Path], Any]:
    """A file that is none of its kind."""

    def write(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"nothing")

    return write


for name in (".cache/old.parquet", "0/._0.png", "0/.ipynb_checkpoints/0.png"):
    attack("wrong", f"images beside {name}", stray(write_file(name)), promise=WORKS)
attack("wrong", "images beside old.parquet", stray(write_file("old.parquet")), "old.parquet")
attack("hang", "a class folder with a link to all of them", stray(lambda data: (data / "0/l").symlink_to(data)), "0/l")


def shard_of(member: Callable[[], tuple[Any, bytes]], *, compressed: bool = False) -> Callable[[Path], list[str]]:
    """An evaluation on a WebDataset shard with one image."""

    def act(folder: Path) -> list[str]:
        model_in(folder)
        with tarfile.open(folder / "data-000.tar", "w:gz" if compressed else "w", format=tarfile.PAX_FORMAT) as shard:
            entry, content = member()
            entry.size = len(content)
            shard.addfile(entry, io.BytesIO(content))
            label = tarfile.TarInfo("0.cls")
            label.size = 1
            shard.addfile(label, io.BytesIO(b"1"))
        return ["evaluate", "model.safetensors", "--source", "data-000.tar", "--image-size", "8"]

    return act


def sparse_member() -> tuple[Any, bytes]:
    """A member of 4 GB, of which nothing is stored."""
    entry = tarfile.TarInfo("0.png")
    sizes = {"major": "1", "minor": "0", "name": "0.png", "realsize": str(2**32)}
    entry.pax_headers = {f"GNU.sparse.{key}": value for key, value in sizes.items()}
    return entry, b"1\n0\n512\n".ljust(512, b"\0") + bytes(512)


attack("bomb", "a shard with a sparse member of 4 GB", shard_of(sparse_member), "data-000.tar")
pages = shard_of(lambda: (tarfile.TarInfo("0.png"), bytes(2**20)), compressed=True)
attack("bomb", "a shard that is compressed", pages, "data-000.tar")


def tar_member(name: str, size: int, kind: bytes = b"0", content: bytes = b"") -> bytes:
    """A member of a shard, of any size that its header says."""
    header = bytearray(512)
    header[: len(name)] = name.encode()
    header[100:108] = b"0000644\0"
    header[124:136] = b"\xff" * 4 + size.to_bytes(8, "big", signed=True) if size < 0 else b"%011o\0" % size
    header[136:148] = b"00000000000\0"
    header[148:157] = b" " * 8 + kind
    header[257:265] = b"ustar\x0000"
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + content + bytes(-len(content) % 512)


def attributes_of(content: bytes) -> bytes:
    """Attributes (pax) of these bytes, and the member they are of."""
    return tar_member("pax", len(content), b"x", content) + tar_member("9.txt", 0)


for title, end in {
    "a member of -512 bytes": tar_member("9.txt", -512),
    "a member of -1024 bytes, as its attributes say": attributes_of(b"14 size=-1024\n"),
    "attributes of a million digits": attributes_of(b"1" * 10**6),
    "attributes of 60,000 digits": attributes_of(b"1" * 60_000) * 20,
    "attributes of a key that does not end": attributes_of(b"2 " * 30_000 + b"=") * 20,
    "attributes of a sparse file whose map does not end": attributes_of(
        b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n"
    ),
    "a damaged header before its last example": tar_member("9.cls", 1, content=b"1").replace(b"ustar", b"USTAR"),
    "a name of a gigabyte": tar_member("long", 2**30, b"L"),
    "a thousand headers of one member": tar_member("long", 1, b"L", b"9") * 1000,
}.items():

    def shard_ending(folder: Path, end: bytes = end) -> list[str]:
        """An evaluation on a shard of one example and something else."""
        model_in(folder)
        example = tar_member("0.cls", 1, content=b"1") + tar_member("0.png", 1, content=b"1")
        (folder / "data-000.tar").write_bytes(example + end + bytes(1024))
        return ["evaluate", "model.safetensors", "--source", "data-000.tar", "--image-size", "8"]

    attack("bomb", f"a shard with {title}", shard_ending, "data-000.tar")


def shard_with(name: str, content: Callable[[], bytes]) -> Callable[[Path], list[str]]:
    """An evaluation on a shard of one example with one more member."""

    def act(folder: Path) -> list[str]:
        import tarfile

        image = image_in(folder).read_bytes()
        with tarfile.open(folder / "data-000.tar", "w") as shard:
            for each, held in (("0.png", image), ("0.cls", b"1"), (name, content())):
                entry = tarfile.TarInfo(each)
                entry.size = len(held)
                shard.addfile(entry, io.BytesIO(held))
        model_in(folder)
        return ["evaluate", "model.safetensors", "--source", "data-000.tar", "--image-size", "8"]

    return act


def zeros_compressed() -> bytes:
    """4 GB of zeros as 4 MB."""
    import gzip

    part = gzip.compress(bytes(2**24), 1)
    return part * 256  # members of one gzip file


for title, member in {
    "gzip": "0.x.gz",
    "a compressed image": "0.jpg.gz",
    "arrays": "0.npz",
    "a tensor": "0.pth",
}.items():
    attack("bomb", f"a shard with {title} of 4 GB", shard_with(member, zeros_compressed), "data-000.tar")
attack("wrong", "a class number of 34 digits in a shard", shard_with("1.cls", lambda: b"0" * 33 + b"2"), "data-000.tar")


def card_of(header: str) -> Callable[[Path], list[str]]:
    """An evaluation on a folder laid out like a data set of the hub, with this header of its README."""

    def act(folder: Path) -> list[str]:
        from pyarrow import parquet, table

        (folder / "cards").mkdir()
        rows = {"image": [{"bytes": image_in(folder).read_bytes(), "path": None}], "label": [0]}
        parquet.write_table(table(rows), folder / "cards" / "test.parquet")
        (folder / "cards" / "README.md").write_text(f"---\n{header}\n---\n")
        model_in(folder)
        return ["evaluate", "model.safetensors", "--source", "hub:cards", "--split", "test", "--image-size", "8"]

    return act


LAUGHS = "a: &a [x, x]\n" + "".join(
    f"{c}: &{c} [{', '.join(['*' + p] * 9)}]\n" for p, c in zip("abcdefgh", "bcdefghi", strict=True)
)
for title, header in {
    "aliases that grow to 10⁸ words": f"{LAUGHS}configs: *i",
    "the files of the whole disk": "configs: [{config_name: a, data_files: '/**/*'}]",
    "a file of the system": "configs: [{config_name: a, data_files: /etc/passwd}]",
    "a folder above": "configs: [{config_name: a, data_files: '../*.parquet'}]",
    "an address": "configs: [{config_name: a, data_files: 'http://127.0.0.1:9/a.parquet'}]",
    "half a million words": f"a: [{'a,' * 500_000}]",
    "lists in lists": "a: " + "[" * 100_000,
    "a number of many digits": "a: " + "9" * 100_000,
    "keys of one hash": "a:\n" + "".join(f"  {i * (2**61 - 1)}: 1\n" for i in range(1, 20_000)),
    "no YAML": "a: [",
}.items():
    attack(
        "code" if "file" in title or "folder" in title or "address" in title or title == "no YAML" else "bomb",
        f"a data set's card: {title}",
        card_of(header),
        "README.md",
    )


def pattern_of(pattern: str) -> Callable[[Path], list[str]]:
    """An evaluation on all files that a pattern stands for."""

    def act(folder: Path) -> list[str]:
        model_in(folder)
        return ["evaluate", "model.safetensors", "--source", pattern]

    return act


for pattern in ("/**/*.parquet", "**/../**/../**/../**/*.parquet", "**/**/**/*.tar"):
    attack("hang", f"a pattern that walks the disk: {pattern}", pattern_of(pattern), "source")


# --- 3: damaged and forged files ----------------------------------------------------------------------------------


def changed(
    path: str, change: Callable[[bytes], bytes], words: Callable[[Path], list[str]] | None = None
) -> Callable[[Path], Any]:
    """A command on a run of which one file is changed."""

    def act(folder: Path) -> Any:
        run = (unfinished_in if path.endswith(".csv") else run_in)(folder)
        file = run / path
        file.write_bytes(change(file.read_bytes()))
        return (words or train_words)(run)

    return act


def edited(*keys: str, value: Any) -> Callable[[bytes], bytes]:
    """A JSON file with another value at some keys; without the last key for ``...``."""

    def change(content: bytes) -> bytes:
        document = json.loads(content)
        place = document
        for key in keys[:-1]:
            place = place[key]
        if value is ...:
            del place[keys[-1]]
        else:
            place[keys[-1]] = value
        return json.dumps(document).encode()

    return change


for title, row in {
    "a formula": b"=1+1,2",
    "a zero": b"2,\0",
    "a number of ten million digits": b"2," + b"9" * 10**7,
    "a number with an underscore": b"2,1_0",
    "a number in other digits": "2,\u0661".encode(),
    "a quote that does not end": b'"2,1',
    "a cell too few": b"2",
    "escapes": ESCAPES.encode() + b",1",
}.items():
    for name in ("train.csv", "eval.csv"):
        rows = b"step,loss\n1,1\n" + row + b"\n3,1\n4,1\n"
        attack("damage", f"{name} with a row of {title}", changed(name, lambda content, rows=rows: rows), name)


def evaluated(run: Path) -> list[str]:
    """Evaluate a run."""
    return ["evaluate", str(run), "--limit-eval-steps", "1"]


GARBAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "noise": lambda content: bytes(range(256)) * 4,
    "nested 100,000 times": lambda content: b"[" * 100_000,
    "a list": lambda content: b"[1, 2]",
    "a number": lambda content: b"7",
    "not UTF-8": lambda content: b'{"a": "\xff\xfe"}',
}
for title, change in GARBAGE.items():
    for command in (train_words, evaluated):
        attack(
            "damage",
            f"{command.__name__.split('_')[0]}: config.json that is {title}",
            changed("config.json", change, command),
            "config.json",
        )
    if title in ("empty",):
        continue
    attack(
        "damage",
        f"train.csv that is {title}",
        changed("train.csv", change),
        "train.csv",
        WORKS if title == "half" else REFUSED,
    )
    attack("damage", f"metrics.json that is {title}", changed("metrics.json", change), "metrics.json")

for keys, value in (
    (("derived", "classes"), 7),
    (("derived", "classes"), [1, 2]),
    (("derived", "classes"), [ESCAPES] * 10),
    (("derived", "classes"), ["a", "b"]),
    (("derived", "data"), "digits"),
    (("derived", "data", "source"), 5),
    (("derived", "data", "image_size"), "large"),
    (("derived", "data", "image_size"), -1),
    (("derived", "data", "mean"), [float("nan")]),
    (("derived", "data", "num_classes"), 10**12),
    (("derived", "data", "batch_size"), True),
    (("derived", "data", "augmentation"), [1]),
    (("derived", "data", "unknown"), 1),
    (("derived", "data"), ...),
):
    name = (
        f"config.json with {'.'.join(keys)} {str(value)[:20]!r}"
        if value is not ...
        else f"config.json without {keys[-1]}"
    )
    attack("damage", name, changed("config.json", edited(*keys, value=value), evaluated))


for keys, value in (
    (("derived", "data", "image_size"), 60_000),
    (("config", "evaluation_size"), 10**9),
    (("derived", "data", "workers"), 10**5),
    (("derived", "data", "prefetch"), 10**12),
    (("derived", "data", "source"), "{0..99999999999}.tar"),
    (("derived", "data", "source"), "{a,b}" * 40 + ".tar"),
    (("derived", "data", "source"), "{c,d}" * 4000 + ".tar"),
    (("derived", "data", "source"), f"{{0..{'9' * 5000}}}.tar"),
    (("derived", "classes"), ["0"] * 10),
):
    act = changed("config.json", edited(*keys, value=value), evaluated)
    attack("bomb", f"a run's {keys[-1]} of {str(value)[:20]!r}", act, "source" if "source" in keys else "config.json")


def with_notes(change: Callable[[dict[str, str]], Any]) -> Callable[[bytes], bytes]:
    """A safetensors file with other notes, and the same tensors."""
    from safetensors.torch import load, save

    def changed_notes(content: bytes) -> bytes:
        notes = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
        change(notes)
        return save(load(content), notes)

    return changed_notes


def predicted(run: Path) -> list[str]:
    """Predict by a run."""
    image_in(run.parent)
    return ["predict", str(run), "image.png"]


for command in (evaluated, predicted, train_words):
    title = command.__name__.partition("_")[0]
    for how, change in {
        "other weights": lambda content: content[:-1] + bytes([content[-1] ^ 1]),
        "no preparation of images": with_notes(lambda notes: notes.pop("normfree.preprocessing")),
        "another activation": with_notes(
            lambda notes: notes.update(normfree=json.dumps({**json.loads(notes["normfree"]), "activation": "silu"}))
        ),
    }.items():
        act = changed("model.safetensors", change, command)
        attack("wrong", f"{title}: a run's weights with {how}", act, "model.safetensors")
    act = changed("metrics.json", edited("model_sha256", value="0" * 64), command)
    attack("wrong", f"{title}: metrics.json of other weights", act, "model.safetensors")
for keys, value in (
    (("derived", "data", "image_size"), 16),
    (("derived", "data", "crop_ratio"), 0.5),
    (("config", "model"), f"{RUN_MODEL},activation=silu"),
):
    act = changed("config.json", edited(*keys, value=value), evaluated)
    attack("wrong", f"a run's config.json with another {keys[-1]} than its weights", act, "model.safetensors")

for keys, value in (
    (("evaluation", "top1"), "high"),
    (("evaluation", "top1"), None),
    (("evaluation", "top1"), float("nan")),
    (("evaluation", "top1"), 7.0),
    (("evaluation", "top5"), [1]),
    (("evaluation", "examples"), "many"),
    (("evaluation", "confusion"), "none"),
    (("evaluation",), {}),
    (("seconds",), None),
    (("skipped_steps",), []),
    (("bad_images",), 7),
):
    title = f"metrics.json with {'.'.join(keys)} {str(value)!r}"
    attack("damage", title, changed("metrics.json", edited(*keys, value=value)), "metrics.json")
attack(
    "wrong", "metrics.json of a run that stopped", changed("metrics.json", edited("status", value=ESCAPES)), "", WORKS
)
for title, header in {"a column of escapes": ESCAPES.encode() + b",step\n", "a column twice": b"step,step\n"}.items():
    change = changed("train.csv", lambda content, header=header: header + b"1,2\n")
    attack("damage", f"train.csv with {title}", change, "", WORKS)
for title, change in {
    "rows twice": lambda content: content + content.partition(b"\n")[2],
    "rows in another order": lambda content: b"\n".join([(lines := content.split(b"\n"))[0], *lines[-2:0:-1], b""]),
}.items():
    attack("wrong", f"train.csv with {title}", changed("train.csv", change), "train.csv")
for command in (train_words, evaluated):
    title = f"{command.__name__.partition('_')[0]}: config.json with a key twice"
    change = changed("config.json", lambda content: content.replace(b'"epochs"', b'"epochs": 1, "epochs"', 1), command)
    attack("damage", title, change, "config.json")


def rewritten_state(
    run: Path, change: Callable[[dict[str, Any]], Any], write: Callable[[Path], None] | None = None
) -> None:
    """Another training state in every checkpoint, with the checksums that belong to it."""
    from normfree.train.checkpoint import _facts, _own_hash

    (run / "metrics.json").unlink(missing_ok=True)
    for folder in sorted((run / "checkpoints").iterdir()):
        state = torch.load(folder / "state.pt", weights_only=True)
        torch.save(change(state), folder / "state.pt") if write is None else write(folder / "state.pt")
        document = json.loads((folder / "manifest.json").read_bytes())
        document.pop("sha256")
        for name in ("state.pt", "model.safetensors"):
            document["files"][name] = _facts(folder / name)
        (folder / "manifest.json").write_text(json.dumps({**document, "sha256": _own_hash(document)}))


def stated(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], list[str]]:
    """Going on from a forged state."""

    def act(folder: Path) -> list[str]:
        run = run_in(folder)
        rewritten_state(run, change)
        return train_words(run)

    return act


attack("code", "a training state that is a pickle", state_pickle, "step_")
for title, change in {
    "a list": lambda state: [state],
    "nothing": lambda state: {},
    "no step": lambda state: {key: value for key, value in state.items() if key != "step"},
    "a step of words": lambda state: {**state, "step": "twelve"},
    "a negative step": lambda state: {**state, "step": -5},
    "a fraction of a step": lambda state: {**state, "step": 1.5},
    "seconds that are no number": lambda state: {**state, "seconds": float("nan")},
    "no optimizer": lambda state: {**state, "optimizer": None},
    "another optimizer": lambda state: {**state, "optimizer": {"state": {}, "param_groups": []}},
    "no data": lambda state: {**state, "data": 5},
    "data of nothing": lambda state: {**state, "data": [None]},
    "data of another order": lambda state: {**state, "data": [{"share": {}}]},
    "a tensor of 10**12": lambda state: {**state, "optimizer": torch.zeros(1).expand(10**12)},
}.items():
    attack("damage", f"a training state with {title}", stated(change), "step_")


def halfway(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], list[str]]:
    """Going on from a forged state of which there are steps left."""

    def act(folder: Path) -> list[str]:
        run = run_in(folder)
        rewritten_state(run, change)
        shutil.rmtree(max((run / "checkpoints").iterdir()))
        return train_words(run)

    return act


def under_other_settings(*keys: str, value: Any) -> Callable[[Path], list[str]]:
    """Going on with a run whose config.json has another setting than its checkpoints were made with."""

    def act(folder: Path) -> list[str]:
        run = unfinished_in(folder)
        shutil.rmtree(max((run / "checkpoints").iterdir()))
        change = edited("config", *keys, value=value)
        (run / "config.json").write_bytes(
            edited("config", "out", value="run")(change((run / "config.json").read_bytes()))
        )
        return ["train", "--config", "run/config.json"]

    return act


for keys, value in (
    (("epochs",), 3),
    (("label_smoothing",), 0.5),
    (("channels_last",), False),
    (("model",), f"{RUN_MODEL},activation=silu"),
    (("optimizer", "learning_rate"), 0.3),
    (("optimizer", "clip_norm"), 0.01),
    (("data", "augmentation", "shift"), 3),
):
    title = f"going on by a config.json with another {'.'.join(keys)}"
    attack("wrong", title, under_other_settings(*keys, value=value), f"{'.'.join(keys)} ")


def with_momenta(change: Callable[[torch.Tensor], Any]) -> Callable[[dict[str, Any]], Any]:
    """A training state with other momenta."""

    def changed_state(state: dict[str, Any]) -> dict[str, Any]:
        for of_parameter in state["optimizer"]["state"].values():
            of_parameter["momentum_buffer"] = change(of_parameter["momentum_buffer"])
        return state

    return changed_state


def with_setting(**setting: Any) -> Callable[[dict[str, Any]], Any]:
    """A training state whose optimizer has another setting."""

    def changed_state(state: dict[str, Any]) -> dict[str, Any]:
        for group in state["optimizer"]["param_groups"]:
            group |= setting
        return state

    return changed_state


def with_data(**position: Any) -> Callable[[dict[str, Any]], Any]:
    """A training state that is at other images."""
    return lambda state: {**state, "data": [{**state["data"][0], **position}]}


attack("wrong", "a training state that is whole", halfway(lambda state: state), "", WORKS)
for title, change in {
    "momenta of one number": with_momenta(lambda momentum: momentum.reshape(-1)[:1].clone()),
    "momenta that are NaN": with_momenta(lambda momentum: momentum * float("nan")),
    "momenta of integers": with_momenta(lambda momentum: momentum.long()),
    "momenta in one row": with_momenta(lambda momentum: momentum.reshape(1, -1)),
    "momenta that are sparse": with_momenta(lambda momentum: momentum.to_sparse()),
    "momenta of words": with_momenta(lambda momentum: "momentum"),
    "no momenta": lambda state: {**state, "optimizer": {**state["optimizer"], "state": {}}},
    "another weight decay": with_setting(weight_decay=1e9),
    "another momentum": with_setting(momentum=0.0),
    "a momentum that is NaN": with_setting(momentum=float("nan")),
    "steps uphill": with_setting(maximize=True),
    "a setting of words": with_setting(nesterov="yes"),
    "a step beyond the end": lambda state: {**state, "step": 10**12},
    "another step than its checkpoint's": lambda state: {**state, "step": state["step"] - 1},
    "images of another epoch": with_data(epoch=10**18),
    "images of a negative step": with_data(step=-3),
    "images of a step of words": with_data(step="three"),
    "images of no end": with_data(step=10**18),
}.items():
    attack("wrong", f"going on from a training state with {title}", halfway(change), "step_")


def other_weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], list[str]]:
    """Going on from a checkpoint of other weights, with the checksums that belong to it."""

    def act(folder: Path) -> list[str]:
        from safetensors.torch import load_file, save_file

        run = run_in(folder)
        for place in (run / "checkpoints").iterdir():
            save_file(change(load_file(place / "model.safetensors")), place / "model.safetensors", {})
        rewritten_state(run, lambda state: state)
        shutil.rmtree(max((run / "checkpoints").iterdir()))
        return train_words(run)

    return act


for title, change in {
    "integers": lambda tensors: {name: tensor.long() for name, tensor in tensors.items()},
    "half precision": lambda tensors: {name: tensor.half() for name, tensor in tensors.items()},
    "NaN": lambda tensors: {name: tensor * float("nan") for name, tensor in tensors.items()},
    "one tensor fewer": lambda tensors: dict(list(tensors.items())[1:]),
}.items():
    attack("wrong", f"going on from weights of {title}", other_weights(change), "step_")


def manifested(change: Callable[[dict[str, Any]], Any], *, signed: bool = True) -> Callable[[Path], list[str]]:
    """Going on from a checkpoint with a forged manifest."""

    def act(folder: Path) -> list[str]:
        from normfree.train.checkpoint import _own_hash

        run = run_in(folder)
        (run / "metrics.json").unlink()
        for place in (run / "checkpoints").iterdir():
            document = json.loads((place / "manifest.json").read_bytes())
            document.pop("sha256")
            document = change(document)
            if signed and isinstance(document, dict):
                document["sha256"] = _own_hash(document)
            (place / "manifest.json").write_text(json.dumps(document))
        return train_words(run)

    return act


for title, change in {
    "no files": lambda manifest: {**manifest, "files": {}},
    "files of a list": lambda manifest: {**manifest, "files": [1]},
    "files without facts": lambda manifest: {**manifest, "files": {"model.safetensors": None}},
    "files above": lambda manifest: {
        **manifest,
        "files": {**manifest["files"], "../../config.json": {"bytes": 1, "sha256": ""}},
    },
    "a step of words": lambda manifest: {**manifest, "step": "x"},
    "a score of a list": lambda manifest: {**manifest, "score": [1]},
    "another schema": lambda manifest: {**manifest, "schema": 2},
    "a list": lambda manifest: [manifest],
    "another field": lambda manifest: {**manifest, "x": 1},
}.items():
    attack("damage", f"a manifest with {title}", manifested(change), "checkpoint")
attack("damage", "a manifest with no checksum", manifested(lambda manifest: manifest, signed=False), "checkpoint")

for title, change in {
    "a module that is not there": {"name": "nowhere"},
    "another class": {"was": "Linear"},
    "a layer of no kind": {"now": "os.system"},
    "a layer for another kind": {"now": "ScaledWSLinear"},
    "a factor of words": {"input_scale": "x"},
    "an infinite factor": {"input_scale": 1e999},
    "a name of a number": {"name": 7},
    "another field": {"x": 1},
}.items():

    def recorded(folder: Path, change: dict[str, Any] = change) -> Any:
        """A converted file with a forged first change."""
        from torch import nn

        layers = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        converted = normfree.convert(nn.Sequential(*layers), torch.randn(4, 1, 8, 8))
        record = converted.conversion.to_dict()  # type: ignore[union-attr, operator]
        record["changes"] = [{**record["changes"][0], **change}, *record["changes"][1:]]
        notes = {"normfree.conversion": json.dumps(record)}
        path = write_tensors(folder / "c.safetensors", dict(converted.state_dict()), notes)
        return lambda: normfree.load(path, original=nn.Sequential(*layers))

    attack("damage", f"a conversion record with {title}", recorded, "c.safetensors")

for title, document in {
    "no schema": {"history": []},
    "history of a number": {"schema": 1, "history": 5},
    "records of nothing": {"schema": 1, "history": [None]},
    "a step of words": {"schema": 1, "history": [{"step": "x", "signal": {}}]},
    "a signal of a list": {"schema": 1, "history": [{"step": 1, "signal": []}]},
    "an infinite step": {"schema": 1, "history": [{"step": float("inf"), "signal": {}}]},
    "blocks of words": {
        "schema": 1,
        "history": [{"step": 0, "signal": {"model": "m", "mode": "train", "input": {}, "entry": "x", "blocks": []}}],
    },
}.items():

    def loaded(folder: Path, document: Any = document) -> Any:
        """A forged history."""
        (folder / "h.json").write_text(json.dumps(document))
        return lambda: normfree.SignalHistory.load(folder / "h.json")

    attack("damage", f"a signal history with {title}", loaded, "h.json")


# --- 5: silently wrong answers ------------------------------------------------------------------------------------


def weighted(change: Callable[[dict[str, torch.Tensor]], Any], command: str) -> Callable[[Path], list[str]]:
    """A model of ours with other weights, evaluated or used to predict."""

    def act(folder: Path) -> list[str]:
        from safetensors import safe_open

        path = model_in(folder)
        image_in(folder)
        with safe_open(path, framework="pt") as file:
            notes, tensors = file.metadata(), {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        tensors = change(tensors) or tensors
        write_tensors(path, tensors, notes)
        if command == "predict":
            return ["predict", "model.safetensors", "image.png"]
        return ["evaluate", "model.safetensors", "--source", "digits", "--limit-eval-steps", "1"]

    return act


def put(value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    """One weight of the classifier with a value."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["classifier.weight"][0, 0] = value

    return change


for command in ("evaluate", "predict"):
    for title, change in {
        "NaN": put(float("nan")),
        "infinity": put(float("inf")),
        "integers": lambda tensors: {name: tensor.to(torch.int64) for name, tensor in tensors.items()},
        "one tensor of bytes": lambda tensors: {
            **tensors,
            "classifier.weight": tensors["classifier.weight"].to(torch.uint8),
        },
        "eight-bit floats": lambda tensors: {name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors.items()},
        "complex numbers": lambda tensors: {name: tensor.to(torch.complex64) for name, tensor in tensors.items()},
        "a tensor that is missing": lambda tensors: {
            name: tensor for name, tensor in tensors.items() if name != "classifier.bias"
        },
        "another shape": lambda tensors: {**tensors, "classifier.bias": torch.zeros(11)},
    }.items():
        attack("wrong", f"{command}: weights of {title}", weighted(change, command), "model")
    for precision in ("float16", "bfloat16", "float64"):
        kind = getattr(torch, precision)
        act = weighted(lambda tensors, kind=kind: {name: tensor.to(kind) for name, tensor in tensors.items()}, command)
        attack("wrong", f"{command}: weights of {precision}", act, promise=WORKS)
    act = weighted(lambda tensors: {**tensors, "classifier.weight": tensors["classifier.weight"].half()}, command)
    attack("wrong", f"{command}: weights of two precisions", act, promise=WORKS)


def forged_preprocessing(suffix: str, change: str | dict[str, Any]) -> Callable[[Path], list[str]]:
    """A file whose metadata say something else of the images and classes, or nothing that can be read."""
    sound = {"image_size": 8, "crop_ratio": 0.875, "mean": [0.5], "std": [0.5], "classes": list("0123456789")}
    metadata = {"normfree.preprocessing": change if isinstance(change, str) else json.dumps({**sound, **change})}

    def act(folder: Path) -> list[str]:
        from normfree.export import to_onnx
        from normfree.weights import load, save

        image_in(folder)
        model = load(model_in(folder, "given.safetensors"))
        if suffix == ".onnx":
            to_onnx(model, torch.randn(1, 1, 8, 8), folder / "forged.onnx", metadata=metadata)
        else:
            save(model, folder / "forged.safetensors", metadata=metadata)
        return ["predict", f"forged{suffix}", "image.png"]

    return act


for suffix in (".onnx", ".safetensors"):
    for title, change in {
        "no JSON": "{",
        "nested deeply": "[" * 100_000,
        "an integer of 100,000 digits": '{"image_size": ' + "9" * 100_000 + "}",
        "two of one class": {"classes": ["a", *"012345678", "a"]},
        "too few classes": {"classes": ["a", "b"]},
        "escapes in a class": {"classes": ["\x1b[31mred\x07", *"012345678", ""]},
        "three colours": {"mean": [0.5] * 3, "std": [0.5] * 3},
        "a deviation of 0": {"std": [0.0]},
        "not a number": {"mean": [float("nan")]},
        "an image of a million pixels squared": {"image_size": 10**6},
        "an image of no size": {"image_size": 0},
        "a crop of nothing": {"crop_ratio": 1e-300},
    }.items():
        names = "" if title == "three colours" else "forged"  # those of the model are known as it runs
        attack("wrong", f"preprocessing of a {suffix} file: {title}", forged_preprocessing(suffix, change), names)
    act = forged_preprocessing(suffix, {"classes": ["\x1b[31mred\x07", *"123456789"]})
    attack("wrong", f"preprocessing of a {suffix} file: a class with escapes", act, promise=WORKS)


def answering(answer: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], list[str]]:
    """An ONNX file that answers with no logits."""

    def act(folder: Path) -> list[str]:
        from torch import nn

        from normfree.export import to_onnx

        class Answering(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.linear = nn.Linear(64, 10)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return answer(self.linear(x.flatten(1)))

        image_in(folder)
        to_onnx(Answering(), torch.randn(1, 1, 8, 8), folder / "answer.onnx", tolerance=1e9)
        return ["predict", "answer.onnx", "image.png"]

    return act


for title, answer in {
    "the largest logit's place": lambda y: y.argmax(1, keepdim=True),
    "one number": lambda y: y[:, :1],
    "whole numbers": lambda y: (10 * y).long(),
    "probabilities": lambda y: y.softmax(1),
    "itself and another answer": lambda y: (y, -y),
    "something random": lambda y: torch.nn.functional.dropout(y, training=True),
}.items():
    attack("wrong", f"a network that answers with {title}", answering(answer), "model")


def pixels_of(pixels: Callable[[Any], Any]) -> Callable[[Path], list[str]]:
    """A TIFF of whole numbers, whose range is not known."""

    def act(folder: Path) -> list[str]:
        import numpy as np
        from PIL import Image

        Image.fromarray(pixels(np.arange(64, dtype=np.int32).reshape(8, 8))).save(folder / "image.tif")
        model_in(folder)
        return ["predict", "model.safetensors", "image.tif"]

    return act


for title, pixels in {"small": lambda x: x, "large": lambda x: x * 2**24, "negative": lambda x: -x}.items():
    attack("wrong", f"pixels that are {title} numbers of 32 bits", pixels_of(pixels), "image.tif")


def white_of(name: str, mode: str = "RGB", **options: Any) -> Callable[[Path], Callable[[], None]]:
    """A black image that says it is white: all of it is transparent, or zero is white."""

    def act(folder: Path) -> Callable[[], None]:
        from PIL import Image

        from normfree.data.records import decode

        Image.new(mode, (8, 8)).save(folder / name, **options)

        def decoded() -> None:
            if decode(folder / name).getextrema() != ((255, 255),) * 3:
                raise RuntimeError("it is not white")

        return decoded

    return act


for title, act in {
    "colour of a PNG": white_of("image.png", transparency=(0, 0, 0)),
    "grey of a PNG": white_of("image.png", mode="L", transparency=0),
    "grey of sixteen bits of a PNG": white_of("image.png", mode="I;16", transparency=0),
    "grey of a GIF": white_of("image.gif", mode="L", transparency=0),
}.items():
    attack("wrong", f"a transparent {title}", act, promise=WORKS)
attack("wrong", "a TIFF whose zero is white", white_of("image.tif", mode="I;16", tiffinfo={262: 0}), promise=WORKS)


def foreign(change: Callable[[str, torch.Tensor], torch.Tensor]) -> Callable[[Path], list[str]]:
    """A state dict of another library's network, to convert."""

    def act(folder: Path) -> list[str]:
        import torchvision

        torch.manual_seed(0)
        tensors = torchvision.models.resnet18().state_dict()
        torch.save({name: change(name, tensor) for name, tensor in tensors.items()}, folder / "w.pth")
        return [*WEIGHTS_OF, "--start", "pretrained", "--image-size", "32"]

    return act


attack(
    "wrong", "a state dict in half precision", foreign(lambda n, t: t.half() if t.is_floating_point() else t), "", WORKS
)
for title, change in {
    "NaN in one layer": lambda name, tensor: tensor * float("nan") if name == "layer1.0.conv1.weight" else tensor,
    "integers": lambda name, tensor: tensor.long(),
    "yes and no": lambda name, tensor: tensor.bool(),
    "complex numbers": lambda name, tensor: tensor.to(torch.complex64),
    "eight-bit floats": lambda name, tensor: tensor.to(torch.float8_e4m3fn),
    "a negative variance": lambda name, tensor: -tensor if name.endswith("running_var") else tensor,
    "sparse tensors": lambda name, tensor: tensor.to_sparse() if tensor.dim() else tensor,
    "tensors without values": lambda name, tensor: tensor.to("meta"),
    "numbers of 16 bits without a sign": lambda name, tensor: tensor.abs().to(torch.uint16),
    "numbers of 64 bits without a sign": lambda name, tensor: tensor.abs().to(torch.int64).view(torch.uint64),
    "other eight-bit floats": lambda name, tensor: tensor.to(torch.float8_e5m2),
    "complex numbers of 32 bits": lambda name, tensor: tensor.to(torch.complex32),
    "quantized tensors": lambda name, tensor: torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8),
}.items():
    attack("wrong", f"a state dict of {title}", foreign(change), "w.pth")


def with_methods(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A parameter whose attributes stand in the place of its methods."""
    parameter = torch.nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
    vars(parameter).update(dict.fromkeys(("detach", "numel", "isfinite", "to", "copy_", "is_floating_point"), 1))
    return parameter


attack("wrong", "a state dict of parameters with other methods", foreign(with_methods), "", WORKS)


def checkpoint_of(taken: str, key: str = "", **others: Any) -> Callable[[Path], Callable[[], None]]:
    """A training script's checkpoint of zeros, which has a state dict of ones under one key."""

    def act(folder: Path) -> Callable[[], None]:
        import argparse

        from normfree.weights.checkpoint import read_state_dict

        parts = {"args": argparse.Namespace(lr=0.1), **others, taken: {"weight": torch.ones(1)}}
        torch.save(parts, folder / "w.pth")

        def read() -> None:
            if float(read_state_dict(f"{folder / 'w.pth'}{key}").tensors["weight"]) != 1:
                raise RuntimeError("other weights were taken")

        return read

    return act


ZEROS = {"weight": torch.zeros(1)}
for taken in ("model_ema", "state_dict_ema", "ema_state_dict"):
    for other in ("model", "state_dict", "model_state_dict"):
        act = checkpoint_of(taken, **{other: ZEROS})
        attack("wrong", f"a checkpoint of {other} and {taken}", act, promise=WORKS)
act = checkpoint_of("model", ":model", model_ema=ZEROS)
attack("wrong", "a checkpoint of model_ema, of which the model is asked for", act, promise=WORKS)
act = checkpoint_of("teacher", student=ZEROS)
attack("wrong", "a checkpoint of a student and a teacher", act, "w.pth:student")

STATISTICS = {"NaN": float("nan"), "infinity": float("inf"), "minus five": -5.0}


def normalized(change: Callable[[Any], None], words: list[str]) -> Callable[[Path], list[str]]:
    """A network with normalizers, with other tensors, given to a command."""

    def act(folder: Path) -> list[str]:
        torch.manual_seed(0)
        model = normfree.create_model("resnetv2_50", **SMALL)
        with torch.no_grad():
            change(model)
        normfree.save(model, folder / "model.safetensors")
        image_in(folder)
        return words

    return act


def fill_variance(value: float) -> Callable[[Any], None]:
    """One running variance with a value."""
    return lambda model: next(b for name, b in model.named_buffers() if name.endswith("running_var"))[0].fill_(value)


def fill_weights(model: Any) -> None:
    """Weights so large that the outputs overflow."""
    for parameter in model.parameters():
        parameter.fill_(1e30)


for words in (
    ["evaluate", "model.safetensors", "--source", "digits", "--limit-eval-steps", "1"],
    ["predict", "model.safetensors", "image.png"],
    ["convert", "model.safetensors", "--start", "pretrained", "--image-size", "16", "--out", "c.safetensors"],
    ["export", "model.safetensors", "--image-size", "16", "--out", "m.onnx"],
):
    for title, value in STATISTICS.items():
        attack("wrong", f"{words[0]}: a running variance of {title}", normalized(fill_variance(value), words), "model")
    if words[0] in ("evaluate", "predict"):
        attack("wrong", f"{words[0]}: weights of 1e30", normalized(fill_weights, words), "model.safetensors")


def unwritable(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], Any]:
    """A model of ours with a weight that a file could not give back, to save."""

    def act(folder: Path) -> Any:
        model = normfree.create_model("nf_resnet50", **SMALL)  # type: ignore[arg-type]
        weight = change(next(model.parameters()).detach())
        model.stem.conv.register_parameter("weight", torch.nn.Parameter(weight, requires_grad=False))  # type: ignore
        return lambda: normfree.save(model, folder / "model.safetensors")

    return act


for title, change in {
    "without values": lambda tensor: tensor.to("meta"),
    "that is sparse": lambda tensor: tensor.to_sparse(),
    "of eight-bit floats": lambda tensor: tensor.to(torch.float8_e4m3fn),
    "of integers": lambda tensor: tensor.long(),
    "of complex numbers": lambda tensor: tensor.to(torch.complex64),
}.items():
    attack("wrong", f"saving a weight {title}", unwritable(change), "model")


def headless(words: list[str]) -> Callable[[Path], list[str]]:
    """A network without a classifier, given to a command."""

    def act(folder: Path) -> list[str]:
        torch.manual_seed(0)
        normfree.save(normfree.create_model("nf_resnet50", **{**SMALL, "num_classes": 0}), folder / "model.safetensors")
        image_in(folder)
        return words

    return act


for words in (["predict", "model.safetensors", "image.png"], ["evaluate", "model.safetensors", "--source", "digits"]):
    attack("wrong", f"{words[0]}: features without a classifier", headless(words), "no classifier")


def other_data(names: list[str], *options: str, run: bool = True) -> Callable[[Path], list[str]]:
    """An evaluation of the run, or its weights alone, on class folders."""

    def act(folder: Path) -> list[str]:
        path = run_in(folder) if run else model_in(folder)
        for name in names:
            for split in ("train", "test"):
                image_in(folder, f"data/{split}/{name}/0.png")
        return ["evaluate", str(path), "--source", "data", "--image-size", "8", *options]

    return act


attack("wrong", "data of the model's classes", other_data(TEN), promise=WORKS)
attack("wrong", "data of two of the classes", other_data(TEN[:2]), "classes")
attack("wrong", "data of eleven classes", other_data([*TEN, "10"]), "classes")
attack("wrong", "data of ten other classes", other_data([f"animal{number}" for number in TEN]), "classes")
attack("wrong", "weights alone, on data of two classes", other_data(TEN[:2], run=False), "classes")
for split in ("validation", "tset", "test2", "train1", "", "\x1b[31m"):
    attack("wrong", f"a split {split!r}", other_data(TEN, "--split", split), "test" if split else "empty")


def digits_split(folder: Path) -> list[str]:
    """A split that the digits do not have."""
    return ["evaluate", str(model_in(folder)), "--source", "digits", "--split", "vaildation"]


attack("wrong", "a split that the digits do not have", digits_split, "test")


def not_utf8(part: str) -> Callable[[Path], list[str]]:
    """Class folders, or images, of a name that is no text."""

    def act(folder: Path) -> list[str]:
        model_in(folder)
        image = image_in(folder)
        names = {"class": ("\udcff", "1.png"), "image": ("0", "\udcff.png")}[part]
        for split in ("train", "test"):
            place = folder / "data" / split / names[0]
            place.mkdir(parents=True)
            shutil.copy(image, place / names[1])
        return ["evaluate", "model.safetensors", "--source", "data", "--image-size", "8"]

    return act


for part in ("class", "image"):
    attack("wrong", f"a name of no encoding: {part}", not_utf8(part), "data")


# --- 6: what is left behind ---------------------------------------------------------------------------------------


class Holder(torch.nn.Module):
    """A network that holds something, and whose forward changes it."""

    def __init__(self, held: Any, change: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.layer, self.held, self.change = torch.nn.Linear(6, 6), held, change
        self.register_buffer("seen", torch.arange(6.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x + layer(x)."""
        self.change(self, x)
        return x + self.layer(x)


def given_back(make: Callable[[], Any], change: Callable[[Any, Any], Any], look: Callable[[Any], Any]) -> None:
    """Measure, convert and export a network that changes what it holds; raises if that is seen afterwards.

    What cannot be copied or traced may be refused by the latter two.
    """

    def convert(model: Any, x: torch.Tensor) -> None:
        normfree.convert(torch.nn.Sequential(model, torch.nn.BatchNorm1d(6)), x)

    def export(model: Any, x: torch.Tensor) -> None:
        with tempfile.TemporaryDirectory() as folder:
            normfree.export.to_program(model, x, Path(folder) / "m.pt2", tolerance=10.0)

    for run in (normfree.spp, convert, export):
        torch.manual_seed(0)
        model, x = Holder(make(), change), torch.ones(4, 6).cumsum(0)
        before, states = look(model), random_states()
        with contextlib.suppress(*() if run is normfree.spp else (ValueError,)):
            run(model, x)
        if look(model) != before or random_states() != states:
            raise RuntimeError(f"{before} became {look(model)}, or a random state moved")


def random_states() -> tuple[Any, ...]:
    """Of torch, Python and NumPy."""
    import numpy as np

    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]


def append_deep(module: Any, x: Any) -> None:
    """Add to a cache of caches, count, and draw."""
    module.held["layers"][0].keys.append(x)
    module.held["layers"][0].length += 1
    module.held["mask"].add_(1)
    torch.rand(1), random.random()


def draw_own(module: Any, x: Any) -> None:
    """Draw from generators of the network's own."""
    torch.rand(1, generator=module.held[0])
    module.held[1].random(), module.held[2].random()


def own_generators() -> list[Any]:
    """One of each library."""
    import numpy as np

    return [torch.Generator().manual_seed(1), np.random.default_rng(1), random.Random(1)]


def own_array() -> Any:
    """A NumPy array."""
    import numpy as np

    return np.arange(4.0)


def closed_over() -> Callable[[], None]:
    """A function that counts in a variable, and notes in a list, of the function around it."""
    count, notes = 0, list[int]()

    def call() -> None:
        nonlocal count
        count += 1
        notes.append(count)

    return call


def shown_caches(model: Any) -> Any:
    """What the caches of :func:`append_deep` hold."""
    cache = model.held["layers"][0]
    return list(model.held), cache.length, len(cache.keys), model.held["mask"].tolist()


def settings_of_process() -> tuple[Any, ...]:
    """Of torch, NumPy and Python, that change what is computed."""
    import numpy as np

    of_torch = torch.get_float32_matmul_precision(), torch.is_anomaly_enabled(), torch.is_autocast_enabled("cpu")
    return *of_torch, torch.backends.cudnn.enabled, np.geterr(), sys.getrecursionlimit()


def change_settings() -> None:
    """Have all of them otherwise."""
    import numpy as np

    torch.set_float32_matmul_precision("medium")
    torch.autograd.set_detect_anomaly(True)
    torch.set_autocast_enabled("cpu", True)
    torch.backends.cudnn.enabled = False
    np.seterr(all="ignore")
    sys.setrecursionlimit(5000)


STATE: dict[str, tuple[Callable[[], Any], Callable[[Any, Any], Any], Callable[[Any], Any]]] = {
    "caches in lists, dicts and objects": (
        lambda: {"layers": [types.SimpleNamespace(keys=[], length=0)], "mask": torch.zeros(2)},
        append_deep,
        shown_caches,
    ),
    "a NumPy array": (own_array, lambda m, x: m.held.fill(7), lambda m: m.held.tolist()),
    "generators": (
        own_generators,
        draw_own,
        lambda m: (m.held[0].get_state().tolist(), str(m.held[1].bit_generator.state), m.held[2].getstate()),
    ),
    "a buffer that is resized": (dict, lambda m, x: m.seen.resize_(99), lambda m: m.seen.tolist()),
    "a buffer with other data": (
        dict,
        lambda m, x: setattr(m.seen, "data", torch.zeros(2)),
        lambda m: (m.seen.data_ptr(), m.seen.tolist()),
    ),
    "a buffer that is deleted": (
        dict,
        lambda m, x: m._buffers.pop("seen", None),
        lambda m: [name for name, _ in m.named_buffers()],
    ),
    "a parameter that is added": (
        dict,
        lambda m, x: m.register_parameter("late", torch.nn.Parameter(x[0].detach().clone())),
        lambda m: [name for name, _ in m.named_parameters()],
    ),
    "variables of a function": (
        closed_over,
        lambda m, x: m.held(),
        lambda m: [str(cell.cell_contents) for cell in m.held.__closure__],
    ),
    "a network that is not registered": (
        lambda: [torch.nn.BatchNorm1d(6)],
        lambda m, x: m.held[0](x),
        lambda m: (m.held[0].running_mean.tolist(), m.held[0].num_batches_tracked.tolist()),
    ),
    "settings of the process": (
        dict,
        lambda m, x: change_settings(),
        lambda m: settings_of_process(),
    ),
    "a lock": (threading.Lock, lambda m, x: setattr(m, "more", x), lambda m: hasattr(m, "more")),
    "torch's settings": (
        dict,
        lambda m, x: (torch.set_num_threads(3), torch.use_deterministic_algorithms(True, warn_only=True)),
        lambda m: (torch.get_num_threads(), torch.get_deterministic_debug_mode()),
    ),
}
for title, (make, change, look) in STATE.items():
    attack(
        "state", f"what is left of {title}", lambda folder, of=(make, change, look): lambda: given_back(*of), "", WORKS
    )


def lock_array(module: Any, x: Any) -> None:
    """Write to an array, and lock it and the array that it is a view of."""
    array = module.held
    array[0] = 9
    array.base.flags.writeable = array.flags.writeable = False


def own_view() -> Any:
    """A view of a NumPy array."""
    return own_array()[:3]


def empty_weight(module: Any, x: Any) -> None:
    """Give up a parameter's memory."""
    module.layer.weight.untyped_storage().resize_(0)
    raise RuntimeError("and it fails besides")


class OwnCopies(torch.nn.BatchNorm1d):
    """A layer that is copied by code of its own: ``way`` is what that does."""

    def __init__(self, way: Callable[[Any], Any]) -> None:
        super().__init__(6)
        self.way = way

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """What ``way`` gives."""
        return self.way(self)


def copied_by(way: Callable[[Any], Any], act: Callable[[Any], Any]) -> Callable[[Path], Callable[[], None]]:
    """Do something to a network one of whose layers is copied in a way of its own, and see that the network stays."""

    def call() -> None:
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Linear(6, 6), OwnCopies(way), torch.nn.ReLU(), torch.nn.Linear(6, 2)
        ).eval()
        before, modules = {name: value.clone() for name, value in model.state_dict().items()}, list(model.modules())
        try:
            act(model)
        finally:
            same = all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
            if modules != list(model.modules()) or not same:
                raise RuntimeError("the model is another")

    return lambda folder: call


def with_weights_of(layer: Any) -> Any:
    """Another layer with the parameters of one."""
    other = torch.nn.BatchNorm1d(6)
    other.weight, other.bias = layer.weight, layer.bias
    return other


def emptying(layer: Any) -> Any:
    """Another layer; the weights of the one are set to zero."""
    torch.nn.init.zeros_(layer.weight)
    return OwnCopies(layer.way)


for title, way, promise in (
    ("gives itself for its copy", lambda layer: layer, REFUSED),
    ("gives its parameters to its copy", with_weights_of, REFUSED),
    ("zeroes its weights when it is copied", emptying, WORKS),
):
    for command, act in {
        "convert": lambda model: normfree.convert(model, torch.randn(8, 6)),
        "fold": normfree.fold,
        "average": normfree.optim.WeightAverage,
    }.items():
        attack("state", f"{command}: a layer that {title}", copied_by(way, act), "'1'" * (promise is REFUSED), promise)

for title, make, change, named in (
    ("an array that is locked", own_view, lock_array, "held"),
    ("a parameter without memory", dict, empty_weight, "layer.weight"),
    ("itself", dict, lambda module, x: normfree.spp(module, x), "measured already"),
):

    def measured(folder: Path, make: Any = make, change: Any = change) -> Callable[[], Any]:
        """A measurement that cannot be undone."""
        return lambda: normfree.spp(Holder(make(), change), torch.ones(4, 6))

    attack("state", f"a model that measures {title}" if title == "itself" else title, measured, named)


def in_threads(run: Callable[[int], Any], compare: Callable[[], Any]) -> Callable[[Path], Callable[[], None]]:
    """Runs in four threads at once, as alone, with the same state of the process before and after."""

    def act(folder: Path) -> Callable[[], None]:
        alone = [run(number) for number in range(4)]

        def call() -> None:
            before = compare()
            with ThreadPoolExecutor(4) as pool:
                found = list(pool.map(run, range(4)))
            if found != alone or compare() != before:
                raise RuntimeError("threads gave something else than one after the other, or left something")

        return call

    return act


def drawing(module: Any, x: Any) -> None:
    """Draw from every global generator, slowly."""
    import numpy as np

    module.held.append(torch.rand(1) + random.random() + np.random.rand())
    time.sleep(0.002)
    module.layer.bias.data.add_(module.held[-1])


@functools.cache
def networks() -> tuple[list[Holder], torch.nn.Module]:
    """Four that draw, and one with a normalizer."""
    torch.manual_seed(0)
    normalized = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU())
    return [Holder([], drawing) for _ in range(4)], normalized


def measure_one(number: int) -> Any:
    """The plot of one of four networks."""
    return normfree.spp(networks()[0][number], torch.ones(4, 6).cumsum(0), seed=number).to_dict()


def convert_one(number: int) -> Any:
    """The weights of one network's conversion from a seed."""
    converted = normfree.convert(networks()[1], torch.arange(768.0).sin().view(4, 3, 8, 8), seed=number)
    return {name: tensor.tolist() for name, tensor in converted.state_dict().items()}


def export_one(number: int) -> Any:
    """The difference of an exported network."""
    with tempfile.TemporaryDirectory() as folder:
        return normfree.export.to_program(networks()[1], torch.ones(2, 3, 8, 8), Path(folder) / "m.pt2").file.relative


def of_the_process() -> Any:
    """Random states, streams, warnings and logging."""
    return random_states(), sys.stdout, sys.stderr, list(warnings.filters), logging.root.manager.disable


for title, run in {
    "four models": measure_one,
    "one model": lambda number: measure_one(0),
    "conversions of one model": convert_one,
    "exports of one model": export_one,
}.items():
    attack("state", f"four threads, {title}", in_threads(run, of_the_process), "", WORKS)


# --- settings that somebody wrote -----------------------------------------------------------------------------------

BILLION = "a: &a [x]\n" + "".join(f"{c}: &{c} [*{b}, *{b}]\n" for b, c in zip("abcdefgh", "bcdefghi", strict=True))
for kind, title, text in (
    ("code", "calls", f"model: !!python/object/apply:os.system ['touch {CANARY}']\n"),
    ("code", "makes objects", "model: !!python/object/new:pathlib.Path [/]\n"),
    ("code", "imports", "model: !!python/module:this\n"),
    ("code", "has a model that is code", f"model: nf_resnet50:width=__import__('os').system('touch {CANARY}')\n"),
    ("bomb", "refers to itself eightfold", BILLION),
    ("bomb", "is nested 5000 deep", "model: " + "[" * 5000 + "]" * 5000),
    ("bomb", "has a number of a million digits", "epochs: " + "9" * 10**6),
    ("bomb", "is a hundred megabytes", "# " + "x" * 10**8),
    ("damage", "has escapes in a name", '"\\x1b]0;owned\\a": 1\n'),
    ("damage", "has escapes as they are", f"{ESCAPES}: 1\n"),
    ("damage", "has a key twice", "epochs: 1\nepochs: 2\n"),
    ("damage", "has a setting twice, with both hyphens", "batch-size: 8\nbatch_size: 9\n"),
    ("damage", "has a setting twice, dotted and nested", "data.seed: 8\ndata: {seed: 9}\n"),
    ("bomb", "has a number of sixties without end", "epochs: !!int '" + ":".join(["59"] * 30_000) + "'\n"),
    ("wrong", "has a number of base eight", "epochs: 010\n"),
    ("wrong", "has a number of base sixty", "epochs: 1:30\n"),
    ("damage", "is a list", "- epochs\n"),
    ("damage", "is two documents", "epochs: 1\n---\nepochs: 2\n"),
    ("damage", "is cut off", "optimizer: {rule: 'mu"),
    ("damage", "is empty", ""),
    ("wrong", "has a date where a number belongs", "epochs: 2020-01-01\n"),
    ("wrong", "has a yes where a number belongs", "epochs: yes\n"),
    ("wrong", "has a setting that there is not", "epochz: 1\n"),
    ("wrong", "has not a number", "optimizer: {learning_rate: .nan}\n"),
):

    def settings(folder: Path, text: str = text) -> list[str]:
        """A recipe, changed by a file."""
        (folder / "own.yaml").write_text(text)
        return ["train", "digits", "--config", "own.yaml", "--limit-train-steps", "1", "--out", "out"]

    attack(kind, f"a YAML config that {title}", settings, "own.yaml")

# --- 7: arguments and factories -----------------------------------------------------------------------------------

for words in (
    ["spp", "nf_resnet50:width=1", "--batch-size", "1000000000000"],
    ["spp", "nf_resnet50:width=1", "--image-size", "100000000"],
    ["spp", "nf_resnet50:width=100000000"],
    ["spp", "nf_resnet50:width=1e400"],
    ["spp", "nf_resnet50:depths=(1000000000,1,1,1)"],
    ["spp", "nf_resnet50:width=" + "(" * 300 + ")" * 300],
    ["spp", "[red]", "--device", "[/red]"],
    ["spp", "x" * 5000],
    ["spp", "a\0b"],
    ["spp", ESCAPES],
    [ESCAPES],
    ["train", "digits", "--data.num-classes", "1000000000000"],
    ["train", "digits", "--seed", str(10**20)],
    ["train", "digits", "--data.workers", "1000000"],
    ["train", "digits", "--data.prefetch", str(10**12)],
    ["train", "digits", "--data.image-size", "100000"],
    ["train", "digits", "--evaluation-size", "1000000"],
    ["train", "digits", "--data.augmentation.shift", "1000000000"],
    ["train", "digits", "--data.augmentation.randaugment-layers", "1000000000"],
    ["train", "digits", "--optimizer.learning-rate", "1e308", "--limit-train-steps", "2"],
    ["train", "digits", "--data.source", "{0..999999999999}.tar"],
    ["export", "nf_resnet50:width=1", "--tolerance", "nan"],
    ["benchmark", "nf_resnet50", "--seconds", "nan"],
    ["benchmark", "nf_resnet50", "--batch-size", str(10**12)],
    ["predict", "none", "x.png", "--top", str(10**30)],
    ["evaluate", "[bold"],
    ["models", "[/nothing]"],
    ["spp", ""],
    ["spp", "nf_resnet50:width=1", "--out", ""],
    ["spp", "nf_resnet50:width=1", "--input", ""],
    ["spp", "nf_resnet50:width=1", "--batches", str(10**15)],
):
    shown = " ".join(words).encode("unicode_escape").decode()[:60]
    attack("argument", f"normfree {shown}", lambda folder, words=words: list(words))


def predict_in(*words: str) -> Callable[[Path], list[str]]:
    """What a model says of an image by some name, in a folder with many kinds of them."""

    def act(folder: Path) -> list[str]:
        model_in(folder)
        for name in (*SPELLINGS, "ok.png", "full/deep/a.PNG", "full/.hidden.png", "links/a.png", "circle/a.png"):
            image_in(folder, name)
        (folder / "broken.png").symlink_to("nothing.png")
        (folder / "links/b.png").symlink_to("nothing.png")
        (folder / "loop.png").symlink_to("loop.png")
        (folder / "linked").symlink_to("full")
        (folder / "circle/up").symlink_to("..")
        (folder / "empty").mkdir()
        (folder / "texts").mkdir()
        (folder / "texts/a.txt").write_text("")
        return ["predict", "model.safetensors", "--top", "1", "--image-size", "8", *words]

    return act


SPELLINGS = (
    "a\nb.png",
    f"{ESCAPES}.png".replace("/", ""),
    "[red]a[bold].png",
    "\U0001f600.png",
    "-x.png",
    "\udcff.png",
    " .png",
    "..png",
    "a:b.png",
    "'\".png",
    "%s%n{0}.png",
    "a\u202eb.png",
    "e\u0301.png",
    "a[1]*.png",
    "a\\b.png",
    "~.png",
    "@ok.png",
    "x" * 251 + ".png",
)
for name in SPELLINGS:
    shown = name.encode("unicode_escape", "surrogatepass").decode()[:60]
    act = predict_in(*(["--"] if name.startswith("-") else []), name)
    attack("argument", f"predict: an image called {shown}", act, promise=WORKS)
for name in ("full", "full/", "./full/../ok.png", "linked"):
    attack("argument", f"predict: {name}", predict_in(name), promise=WORKS)
for name, named in {
    "*.png": "without quotes",
    "fu*/*.png": "without quotes",
    "-": "'-'",
    "/dev/stdin": "/dev/stdin",
    "http://127.0.0.1:9/x.png": "download it first",
    "file:///etc/passwd": "download it first",
    "data:image/png;base64,xx": "data:image",
    "empty": "empty",
    "texts": "texts",
    "broken.png": "broken.png",
    "loop.png": "loop.png",
    "links": "links/b.png",
    "circle": "circle/up",
    "/": "'/",
    "model.safetensors": "model.safetensors",
    "~/ok.png": "~/ok.png",
    "OK.PNG": "OK.PNG",
    "ok.png/x": "ok.png/x",
    "a\0b.png": "images",
    "x" * 5000: "images",
}.items():
    attack("argument", f"predict: {name[:40]!r}", predict_in(name), named)

for command, words in {
    "predict": (
        ["--image-size", "1e3"],
        ["--image-size", "0x10"],
        ["--image-size", "-8"],
        ["--image-size", "8.0"],
        ["--top", "-1"],
        ["--top", "nan"],
        ["--mean", "nan"],
        ["--mean", "1", "2"],
        ["--std", "0"],
        ["--std", "inf"],
        ["--crop-ratio", "nan"],
        ["--crop-ratio", "1e-30"],
        ["--crop-ratio", "2"],
        ["--run", "nowhere"],
        ["--original", "os:system"],
        ["--weights", "ok.png"],
        ["--json", "yes"],
        [f"--top={ESCAPES}"],
        [f"--{ESCAPES}"],
    ),
    "spp": (
        ["--device", "meta"],
        ["--device", "cuda:99"],
        ["--device", "fpga"],
        ["--device", "mkldnn"],
        ["--seed", "-1"],
        ["--seed", str(2**64)],
        ["--batches", "0"],
        ["--batch-size", "0"],
        ["--input", "http://127.0.0.1:9/x.tar"],
        ["--input", "/dev/zero"],
        ["--input", "*.png"],
        ["--input", "digits:3"],
        ["--out", "/proc/x"],
        ["--out", "ok.png"],
        ["--mean", "5"],
    ),
    "export": (
        ["--tolerance", "-1"],
        ["--opset", "999"],
        ["--out", "m.txt"],
        ["--out", "/proc/m.onnx"],
        ["--image-size", "0"],
        ["--batch-size", "0"],
        ["--source", "nothing"],
    ),
    "evaluate": (
        ["--source", "digits", "--workers", "-1"],
        ["--source", "digits", "--split", "../x"],
        ["--source", "digits", "--json", "/proc/x"],
        ["--source", "digits", "--image-size", "4097"],
        ["--source", "http://127.0.0.1:9/x.parquet"],
        ["--source", "s3://someone/x.parquet"],
        ["--source", "file:///etc/passwd"],
        ["--source", "hub:"],
        ["--source", "hub:../x"],
        ["--source", ":::"],
        ["--source", "{a,b}"],
        ["--source", "[a"],
        ["--source", "-"],
        ["--source", "*"],
        ["--source", "model.safetensors"],
    ),
}.items():
    for more in words:

        def told(folder: Path, command: str = command, more: list[str] = more) -> list[str]:
            """A command on a model with an argument that it does not take."""
            model_in(folder)
            image_in(folder, "ok.png")
            return [command, "model.safetensors", *(["ok.png"] if command == "predict" else []), *more]

        shown = " ".join(more).encode("unicode_escape").decode()[:60]
        attack("argument", f"{command} {shown}", told)

NO_PLACES: dict[str, Callable[[Path], Any]] = {
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to nowhere below a file": lambda path: path.symlink_to("/dev/null/nowhere/at.all"),
    "a named pipe": os.mkfifo,
    "a device": lambda path: path.symlink_to("/dev/full"),
}
for title, make in NO_PLACES.items():
    for words in (
        ["spp", "MODEL", "--out", "PLACE"],
        ["train", "digits", "--out", "PLACE"],
        ["convert", "MODEL", "--out", "PLACE.safetensors"],
        ["export", "MODEL", "--out", "PLACE.onnx"],
        ["evaluate", "MODEL", "--source", "digits", "--json", "PLACE.json"],
    ):
        if "." in words[-1] and make is NO_PLACES["a link to itself"]:
            continue  # where a file takes its place

        def placed(folder: Path, make: Callable[[Path], Any] = make, words: list[str] = words) -> list[str]:
            """A command that would write there."""
            model_in(folder)
            make(folder / words[-1].replace("PLACE", "place"))
            return [word.replace("MODEL", "model.safetensors").replace("PLACE", "place") for word in words]

        attack("argument", f"{words[0]}: {title} as {words[-2]}", placed, "place")
for words in (["spp", "MODEL", "--out", "x" * 300], ["evaluate", "MODEL", "--source", "digits", "--json", "x" * 300]):

    def long_name(folder: Path, words: list[str] = words) -> list[str]:
        """A command that would write to a name that is too long."""
        return [word.replace("MODEL", str(model_in(folder))) for word in words]

    attack("argument", f"{words[0]}: a name of 300 letters as {words[-2]}", long_name, words[-2].strip("-"))

for title, body in {
    "exits": "import sys; sys.exit()",
    "exits with a code": "import sys; sys.exit(3)",
    "raises nothing said": "raise RuntimeError",
    "raises escapes": f"raise ValueError({ESCAPES!r})",
    "raises a megabyte": "raise ValueError('x' * 10**6)",
    "recurses": "return net()",
    "returns nothing": "return None",
    "returns itself": "return net",
    "exits with escapes": f"import sys; sys.exit({ESCAPES!r})",
    "raises what only ends generators": "raise GeneratorExit",
    "raises what only ends tasks": "import asyncio; raise asyncio.CancelledError",
    "raises something of its own": "raise type('Own', (BaseException,), {})('x')",
    "raises what cannot say itself": "raise type('Mute', (Exception,), {'__str__': lambda self: None})",
    "raises many errors": f"raise ExceptionGroup({ESCAPES!r}, [ValueError({ESCAPES!r}), OSError()])",
    "ends an iteration": "raise StopIteration",
    "is a generator": "yield 1",
    "is a coroutine": "async def own(): pass\n    return own()",
    "returns a batch without values": "import torch; return torch.nn.Linear(3, 3), torch.zeros(2, 3, device='meta')",
    "returns a batch of text": "import torch; return torch.nn.Linear(3, 3), 'batch'",
    "returns a batch of NaN": "import torch; return torch.nn.Linear(3, 3), torch.full((2, 3), float('nan'))",
    "returns a state dict": "import torch; return torch.nn.Linear(3, 3).state_dict()",
}.items():

    def factory(folder: Path, body: str = body) -> list[str]:
        """A factory."""
        (folder / "nets.py").write_text(f"def net():\n    {body}\n")
        return ["spp", "nets.py:net"]

    attack("argument", f"a factory that {title}", factory, "batch" if "a batch" in title else "nets.py")

for title, content in {
    "that is cut off": b"def net(:\n",
    "of null bytes": b"def net():\n\0 return 1",
    "in UTF-16": "def net(): pass".encode("utf-16"),
    "in no encoding": b"# coding: nothing\n",
    "of nothing": b"",
    "nested 500 times": b"x=" + b"(" * 500 + b")" * 500,
    "that raises escapes": f"raise ValueError({ESCAPES!r})".encode(),
    "that exits": b"import sys; sys.exit()",
    "that raises something of its own": b"raise type('Own', (BaseException,), {})",
    "whose factory is a number": b"net = 5",
    "whose factory wants arguments": b"def net(a, *, b): pass",
}.items():

    def program(folder: Path, content: bytes = content) -> list[str]:
        """A file of a factory."""
        (folder / "nets.py").write_bytes(content)
        return ["spp", "nets.py:net"]

    attack("argument", f"a program {title}", program, "nets.py")

FORWARD = """import torch
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.norm = torch.nn.Conv2d(3, 3, 1), torch.nn.BatchNorm2d(3)
    def forward(self, x):
        {body}
def net():
    return Net(), torch.rand(2, 3, 8, 8)
"""
for title, body in {
    "exits": "import sys; sys.exit()",
    "raises something of its own": "raise type('Own', (BaseException,), {})",
    "raises nothing said": "raise RuntimeError",
    "raises escapes": f"raise RuntimeError({ESCAPES!r})",
    "raises what cannot say itself": "raise type('Mute', (Exception,), {'__str__': lambda self: None})",
    "recurses": "return self(x)",
    "returns nothing": "return None",
}.items():
    for words in (
        ["spp", "nets.py:net"],
        ["doctor", "nets.py:net"],
        ["convert", "nets.py:net", "--out", "c.safetensors"],
        ["export", "nets.py:net", "--out", "m.onnx"],
        ["benchmark", "nets.py:net", "--seconds", "0.1", "--batch-size", "2", "--image-size", "8"],
    ):

        def failing(folder: Path, body: str = body, words: list[str] = words) -> list[str]:
            """A model whose forward fails."""
            (folder / "nets.py").write_text(FORWARD.format(body=body))
            return words

        attack("argument", f"{words[0]}: a forward that {title}", failing, "model: ")


MODEL = """import torch
class Net(torch.nn.Module):
    {method}
    def __init__(self):
        super().__init__()
        self.layer, self.norm, self.end = torch.nn.Conv2d(3, 3, 1), torch.nn.BatchNorm2d(3), torch.nn.Linear(3, 4)
    def forward(self, x):
        return self.end(self.norm(self.layer(x)).relu().mean((2, 3)))
def net():
    model, batch = Net(), torch.rand(2, 3, 8, 8)
    {change}
    return model, batch
"""
COMMANDS = (
    ["spp", "nets.py:net"],
    ["doctor", "nets.py:net"],
    ["convert", "nets.py:net", "--out", "c.safetensors"],
    ["export", "nets.py:net", "--out", "m.onnx"],
    ["predict", "nets.py:net", "image.png", "--image-size", "8"],
    ["benchmark", "nets.py:net", "--seconds", "0.1", "--batch-size", "2", "--image-size", "8"],
)
for title, method, change, without in (
    ("with a number in the place of a module", "", "model._modules['a'] = 5", ()),
    ("with a module by a number's name", "", "model._modules[5] = torch.nn.ReLU()", ()),
    ("with a number in the place of a parameter", "", "model._parameters['a'] = 5", ()),
    ("with text in the place of a buffer", "", "model._buffers['a'] = 'x'", ()),
    ("that is a part of itself", "", "model._modules['me'] = model", ()),
    ("without a hash", "__hash__ = None", "", ()),
    ("with a batch that holds itself", "", "batch = []; batch.append(batch); batch = (batch,)", ()),
    (
        "with a batch larger than the memory",
        "",
        "batch = torch.rand(1).expand(2, 3, 100_000, 1_000_000)",
        ("predict", "benchmark"),
    ),
):
    for words in COMMANDS:
        if words[0] in without:
            continue

        def strange(folder: Path, method: str = method, change: str = change, words: list[str] = words) -> list[str]:
            """A command on a factory's model."""
            (folder / "nets.py").write_text(MODEL.format(method=method or "pass", change=change or "pass"))
            image_in(folder)
            return words

        attack("argument", f"{words[0]}: a model {title}", strange, "memory" if "memory" in title else "model: ")

for words in COMMANDS:
    if words[0] != "doctor":  # which fails where it finds something

        def returning(folder: Path, words: list[str] = words) -> list[str]:
            """A command on a model whose train() returns nothing, as many are written."""
            method = "def train(self, mode=True): super().train(mode)"
            (folder / "nets.py").write_text(MODEL.format(method=method, change="pass"))
            image_in(folder)
            return words

        attack("argument", f"{words[0]}: a model whose train() returns nothing", returning, promise=WORKS)


def tried(folder: Path, chosen: Callable[[Attack], bool] = lambda one: True) -> list[dict[str, Any]]:
    """Carry out attacks, each in a folder of its own; what was promised and what came of it."""
    results = []
    for number, one in enumerate(one for one in ATTACKS.values() if chosen(one)):
        place = folder / f"attack{number}"
        place.mkdir()
        began = time.monotonic()
        found = outcome(one, place)
        seconds = time.monotonic() - began
        results.append(
            {"kind": one.kind, "name": one.name, "promise": one.promise, "outcome": found, "seconds": round(seconds, 2)}
        )
        shutil.rmtree(place, ignore_errors=True)
    return results
