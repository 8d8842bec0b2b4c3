"""What reaches the terminal: text alone, whatever names, paths and errors hold; and how the command ends."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
from rich.progress import Progress
from rich.table import Table

import normfree
from normfree.cli import main
from normfree.commands.shared import Terminal
from normfree.terminal import closed_output, is_command

HOSTILE = {
    "colour": "\x1b[31mred\x1b[0m",
    "title": "\x1b]0;owned\x07",
    "clear": "\x1b[2J\x1b[H",
    "C1": "\x9b31mred",
    "overwriting": "good\rbad",
    "backspace": "ab\b\bcd",
    "right to left": "abc\u202edef\u2066",
    "bell": "\a\a",
    "surrogate": "file\udcff.png",
    "line separator": "a\u2028b\x85c",
}
MARKUP = ["[red]red[/red]", "[/red]", "[link=http://x]", "[bold", "a\\[b]", "[/]", "\\"]
ACTING = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def shown(draw) -> str:
    file = io.StringIO()
    draw(Terminal(file=file, width=100))
    return file.getvalue()


def in_a_table(console, text):
    table = Table("name")
    from rich.markup import escape

    table.add_row(escape(text))
    console.print(table)


@pytest.mark.parametrize("kind", HOSTILE)
def test_no_text_controls_the_terminal(kind):
    text = HOSTILE[kind]
    for draw in (
        lambda console: console.print(text, markup=False),
        lambda console: console.print(text),
        lambda console: in_a_table(console, text),
        lambda console: console.print(Table(title=text)),
    ):
        printed = shown(draw)
        assert not ACTING.search(printed), printed
        printed.encode()


def test_a_name_between_colons_is_no_picture():
    for draw in (
        lambda console: console.print("net.py:heart: no error"),
        lambda console: in_a_table(console, "net.py:heart: 2"),
        lambda console: console.print(Table("a column that is wide", title="net.py:heart:")),
    ):
        assert "net.py:heart:" in shown(draw)


def test_colours_and_progress_of_our_own_are_kept():
    file = io.StringIO()
    console = Terminal(file=file, width=80, force_terminal=True, color_system="standard")
    console.print("[red]error[/red]")
    with Progress(console=console) as progress:
        progress.add_task("\x1b[2Jtask", total=1)
    assert "\x1b[31merror\x1b[0m" in file.getvalue()
    assert "\\x1b[2J" in file.getvalue() and "\x1b[2J" not in file.getvalue()


def test_markup_in_names_and_paths_is_text(tmp_path, capsys):
    folder = tmp_path / "".join(MARKUP).replace("/", "∕")
    folder.mkdir()
    (folder / "nets.py").write_text(
        "from torch import nn, randn\n"
        f"NAMES = {[name.replace('.', '') for name in MARKUP]!r}\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        for name in NAMES:\n"
        "            part = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU())\n"
        "            self.add_module(name, part)\n"
        "    def forward(self, x):\n"
        "        for part in self.children():\n"
        "            x = x + part(x)\n"
        "        return x\n"
        "def net():\n    return Net(), randn(2, 3, 8, 8)\n"
    )
    source = f"{folder / 'nets.py'}:net"
    assert main(["doctor", source, "--out", str(folder / "doctor")]) in (0, 1)
    assert main(["convert", source, "--out", str(folder / "m.safetensors")]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed.replace("\n", "") for name in ("[red]red", "[link=http:", "[bold"))
    for name in MARKUP:
        for form in ("{}", "timm:{}", "torchvision:{}", "{}.py:f", "nf_resnet50:{}", "{}.safetensors"):
            assert main(["spp", form.format(name)]) == 2
            told = capsys.readouterr().err
            assert told.count("\n") == 1 and "NORMFREE_TRACEBACK" not in told


@pytest.mark.parametrize("kind", HOSTILE)
def test_names_in_files_and_arguments_are_text(kind, tmp_path, capsys):
    from safetensors.torch import save_file

    hostile = HOSTILE[kind].replace("\udcff", "\udcff".encode("utf-8", "backslashreplace").decode())
    model = normfree.create_model("nf_resnet50", num_classes=3, depths=(1, 1, 1, 1), widths=(16, 16, 16, 16))
    note = json.dumps({"name": hostile, "num_classes": 3})
    save_file(model.state_dict(), tmp_path / "a.safetensors", {"normfree": note})
    save_file(
        {hostile: model.state_dict()["classifier.weight"]},
        tmp_path / "b.safetensors",
        {"normfree": json.dumps(model.config)},
    )
    save_file(model.state_dict(), tmp_path / "c.safetensors", {"normfree.conversion": json.dumps({"schema": hostile})})
    for words in (["spp", str(tmp_path / f"{name}.safetensors")] for name in "abc"):
        assert main(words) == 2
        told = capsys.readouterr().err
        assert told.count("\n") == 1 and not ACTING.search(told.replace("\n", "")), told
    for words in (
        ["spp", HOSTILE[kind].replace("\0", "")],
        ["models", HOSTILE[kind]],
        [HOSTILE[kind]],
        ["spp", "nf_resnet50", "--device", hostile],
    ):
        assert main(words) == 2
        told = capsys.readouterr().err
        assert told.count("\n") == 1 and not ACTING.search(told.replace("\n", "")), told


NUMBERS = {
    "batch": ["spp", "nf_resnet50:width=1", "--batch-size", "1000000000000"],
    "beyond 64 bits": ["spp", "nf_resnet50:width=1", "--batch-size", str(10**30)],
    "size": ["spp", "nf_resnet50:width=1", "--image-size", "100000000"],
    "digits": ["spp", "nf_resnet50:width=1", "--seed", "9" * 5000],
    "width": ["spp", "nf_resnet50:width=100000000"],
    "infinite width": ["spp", "nf_resnet50:width=1e400"],
    "depths": ["spp", "nf_resnet50:depths=(1000000000,1,1,1)"],
    "no depths": ["spp", "nf_resnet50:depths=(-5,1,1,1)"],
    "nested": ["spp", "nf_resnet50:width=" + "(" * 300 + ")" * 300],
    "classes": ["train", "digits", "--data.num-classes", "1000000000000"],
    "alpha": ["convert", "torchvision:resnet18", "--out", "m.safetensors", "--alpha", "1e400"],
    "no number": ["convert", "torchvision:resnet18", "--out", "m.safetensors", "--alpha", "nan"],
    "tolerance": ["export", "nf_resnet50:width=1", "--tolerance", "nan"],
    "top": ["predict", "none", "x.png", "--top", str(10**30)],
    "seconds": ["benchmark", "nf_resnet50", "--seconds", "nan"],
    "NUL": ["spp", "a\0b"],
    "long path": ["spp", "x" * 5000],
    "long path of weights": ["evaluate", "x" * 5000 + ".safetensors"],
}


@pytest.mark.parametrize("numbers", NUMBERS)
def test_no_argument_gives_a_traceback(numbers, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(NUMBERS[numbers]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and len(told) <= 520 and "NORMFREE_TRACEBACK" not in told, told


COMMAND = [sys.executable, "-m", "normfree"]


def test_whoever_reads_may_stop(tmp_path):
    run = subprocess.run(
        ["bash", "-c", '"$@" | head -c 10', "bash", *COMMAND, "models"], capture_output=True, check=False
    )
    assert run.stderr == b"" and len(run.stdout) == 10


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_streams_may_be_closed(closed):
    run = subprocess.run(
        [
            "bash",
            "-c",
            f'"$@" {closed}; echo code $? >/dev/tty 2>/dev/null; exit 0',
            "bash",
            *COMMAND,
            "models",
            "nf_resnet50",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in run.stderr and "Exception ignored" not in run.stderr


@pytest.mark.parametrize(
    "words", [["--help"], ["--version"], ["models", "--help"], ["--tyro-print-completion", "bash"]]
)
def test_help_on_a_full_device_is_one_line(words):
    with open("/dev/full", "w") as full:
        run = subprocess.run([*COMMAND, *words], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert run.returncode == 2 and run.stderr.count("\n") == 1 and "space" in run.stderr, run.stderr


def test_an_error_on_a_full_device_keeps_its_code():
    with open("/dev/full", "w") as full:
        run = subprocess.run([*COMMAND, "nothing"], stdout=subprocess.PIPE, stderr=full, check=False)
    assert run.returncode == 2


def test_a_help_in_one_column_ends():
    environment = {**os.environ, "COLUMNS": "1"}
    run = subprocess.run([*COMMAND, "models", "--help"], env=environment, capture_output=True, timeout=60, check=False)
    assert run.returncode == 0 and b"usage" in run.stdout


def test_a_full_device_is_one_line():
    with open("/dev/full", "w") as full:
        run = subprocess.run([*COMMAND, "models"], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert run.returncode == 2 and run.stderr.count("\n") == 1 and "No space left" in run.stderr


@pytest.mark.parametrize("encoding", ["ascii", "utf-16"])
def test_any_encoding_prints(encoding):
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "LC_ALL": "C", "PYTHONUTF8": "0"}
    for words in (["models", "nf_resnet50"], ["spp", "nf_resnet50π—×"]):
        run = subprocess.run([*COMMAND, *words], capture_output=True, env=environment, check=False)
        assert run.returncode == (0 if words[0] == "models" else 2), run.stderr
        assert b"Traceback" not in run.stderr


@pytest.mark.parametrize("after", [0.5, 1.5])
def test_an_interrupt_is_one_line_at_any_time(after):
    process = subprocess.Popen(
        [*COMMAND, "spp", "nf_resnet50"],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    time.sleep(after)
    process.send_signal(signal.SIGINT)
    told = process.communicate(timeout=60)[1]
    # CPython ends by the signal itself if the interrupt came within code that exec() compiled (a dataclass, say): a
    # shell shows 130 for both.
    assert told.strip() == "normfree: interrupted" and process.returncode in (130, -signal.SIGINT)


@pytest.mark.parametrize("words", [["models", "nf_resnet50"], ["models", "no such"], ["no command"]])
def test_an_interrupt_counts_whatever_became_of_it(words, monkeypatch, capsys):
    monkeypatch.setattr("normfree.terminal._raised", [signal.SIGINT])  # a library has caught it, or failed for it
    assert main(words) == 130
    assert capsys.readouterr().err == "normfree: interrupted\n"


def test_only_the_command_ends_at_an_interrupt_of_its_import():
    assert is_command(["python", "-m", "normfree", "spp"]) and is_command(["python", "/usr/bin/normfree", "spp"])
    assert not is_command(["python", "-m", "pytest"]) and not is_command(["python", "train.py", "normfree"])


@pytest.mark.parametrize("options", [[], ["-P"]])
def test_a_current_folder_that_was_removed_is_one_line(options, tmp_path):
    (tmp_path / "gone").mkdir()
    script = f'cd "{tmp_path}/gone" && rmdir ../gone && exec "$@"'
    words = ["sh", "-c", script, "sh", sys.executable, *options, "-m", "normfree", "models"]
    environment = {**os.environ, "PYTHONPATH": str(Path(normfree.__file__).parents[1])}  # no relative one
    run = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    assert run.returncode == 2 and run.stderr.startswith("normfree: the current folder was removed"), run.stderr
    assert run.stderr.count("\n") == 1


def test_no_file_beside_a_model_is_imported_in_the_place_of_a_package(tmp_path):
    for name in ("tyro", "http", "rich", "numpy", "safetensors", "torchvision"):
        (tmp_path / f"{name}.py").write_text(f"open('imported_{name}', 'w').close()")
    (tmp_path / "net.py").write_text("from torch import nn\ndef net():\n    return nn.Sequential(nn.Linear(4, 4))\n")
    for words in (["net.py:net"], ["nf_resnet26", "--image-size", "8"]):
        run = subprocess.run(
            [*COMMAND, "spp", *words, "--batch-size", "2"], cwd=tmp_path, capture_output=True, text=True
        )
        assert run.returncode in (0, 2) and not list(tmp_path.glob("imported_*")), run.stderr


@contextmanager
def unread():
    """Have a standard output whose reader is gone."""
    reader, writer = os.pipe()
    os.close(reader)
    before = sys.stdout
    with os.fdopen(writer, "w") as sys.stdout:
        try:
            yield
        finally:
            sys.stdout = before


def chained(*errors):
    """Errors, each of which came of the next."""
    for error, cause in pairwise(errors):
        error.__cause__ = cause
    return errors[0]


def test_a_broken_pipe_is_found_wherever_it_stands_in_the_chain():
    handled = ValueError()
    handled.__context__ = chained(RuntimeError(), BrokenPipeError())
    with unread():
        assert closed_output(BrokenPipeError())
        assert closed_output(chained(ValueError(), RuntimeError(), BrokenPipeError()))
        assert closed_output(handled)
        assert not closed_output(chained(ValueError(), RuntimeError()))


def test_a_chain_may_be_a_ring():
    first, second = ValueError(), RuntimeError()
    first.__cause__, second.__context__ = second, first
    with unread():
        assert not closed_output(first)
        second.__cause__ = BrokenPipeError()
        assert closed_output(first)


def test_an_output_that_is_read_is_open():
    assert not closed_output(BrokenPipeError())


def test_what_torch_says_of_the_environment_is_one_line():
    """It raises as it is imported, and cannot be imported again."""
    environment = {**os.environ, "TORCH_LOGS": "nothing"}
    run = subprocess.run([*COMMAND, "spp", "x"], capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 2 and run.stderr.count("\n") == 1, run.stderr
    assert "Invalid log settings: nothing" in run.stderr and len(run.stderr) < 520


@pytest.mark.parametrize("backend", ["nothing", "module://no.such.module", "TkAgg"])
def test_figures_are_drawn_whatever_backend_is_named(backend, tmp_path):
    """None is used; matplotlib refused the first as it was imported, after the measurement."""
    model = "nf_resnet50:width=1,depths=(1,1,1,1),stem=cifar"
    words = ["spp", model, "--image-size", "16", "--batch-size", "2", "--out", str(tmp_path)]
    environment = {**os.environ, "MPLBACKEND": backend}
    run = subprocess.run([*COMMAND, *words], capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0 and (tmp_path / "spp.png").stat().st_size > 10_000, run.stderr


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_warning_is_text(kind, capsys):
    from normfree.cli import _format_warning

    for file in (normfree.__file__, __file__):
        assert not ACTING.search(_format_warning(HOSTILE[kind], UserWarning, file, 1, ""))
