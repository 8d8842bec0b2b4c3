"""The curves of a run: whole rows only, up to the step it goes on from; and what is shown of it while it runs.

That is lines where there is no terminal, whatever takes long, and a bar where there is one.
"""

import io
import re
import threading
import time

import pytest
from rich.console import Console

from normfree.commands.shared import Terminal
from normfree.train import records
from normfree.train.records import Curve, Progress, read_rows


def test_a_curve_drops_the_steps_that_are_taken_again(tmp_path):
    curve = Curve(tmp_path / "c.csv", ("step", "loss"), 0)
    for step in (1, 2, 3):
        curve.add({"step": step, "loss": 1 / step})
    with (tmp_path / "c.csv").open("a") as file:
        file.write("4,0.2")  # killed while writing
    assert Curve(tmp_path / "c.csv", ("step", "loss"), 2).rows == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}]


@pytest.mark.parametrize("cut", ["4,0.2", "4", "4,", "4,0.25,\n", "4\n", "4,0.2x\n"])
def test_a_row_that_was_cut_off_is_left_out(cut, tmp_path):
    (tmp_path / "c.csv").write_text(f"step,loss\n3,0.5\n{cut}")
    assert read_rows(tmp_path / "c.csv") == [{"step": 3, "loss": 0.5}]


@pytest.mark.parametrize(
    ("steps", "told"),
    [
        ("1 2 2", "step 2 follows step 2"),
        ("1 3 2", "step 2 follows step 3"),
        ("1 2 1 2", "step 1 follows step 2"),
        ("2 1", "step 1 follows step 2"),
        ("-1 2", "its first step is -1"),
        ("1.5 2", "its first step is 1.5"),
        ("1 nan", "step nan follows step 1"),
    ],
)
def test_steps_that_do_not_rise_are_damage(steps, told, tmp_path):
    path = tmp_path / "train.csv"
    path.write_text("step,loss\n" + "".join(f"{step},0.5\n" for step in steps.split()))
    before = path.read_bytes()
    with pytest.raises(ValueError, match=rf"run='.*train\.csv': is no sound file of a run's curve \({told}\); restore"):
        Curve(path, ("step", "loss"), 9)
    assert path.read_bytes() == before


def test_a_step_that_is_evaluated_again_is_there_once(tmp_path):
    """Earlier versions left both rows."""
    path = tmp_path / "eval.csv"
    path.write_text("step,top1\n1,0.25\n1,0.5\n2,0.5\n2,0.75\n")
    curve = Curve(path, ("step", "top1"), 2)
    assert curve.rows == [{"step": 1, "top1": 0.5}, {"step": 2, "top1": 0.75}]
    curve.add({"step": 2, "top1": 1.0})
    assert curve.rows == read_rows(path) == [{"step": 1, "top1": 0.5}, {"step": 2, "top1": 1.0}]
    path.write_text("step,top1\n2,0.25\n1,0.5\n")
    with pytest.raises(ValueError, match="step 1 follows step 2"):
        read_rows(path)


def test_a_full_disk_names_the_curve(tmp_path):
    curve = Curve(tmp_path / "train.csv", ("step", "loss"), 0)
    (tmp_path / "train.csv").unlink()
    (tmp_path / "train.csv").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: '.*/train\.csv'"):
        curve.add({"step": 1, "loss": 1.0})


LINE = r"(epoch \d+/\d+  )?step \d+/\d+(  loss [\d.na]+  [\d,]+ images/s)?(  \d+:\d\d:\d\d left)?(  [a-z]+)?"


@pytest.fixture
def often(monkeypatch):
    """Lines every twentieth of a second."""
    monkeypatch.setattr(records, "INTERVAL", 0.05)


def printed(work, **options):
    """The lines that are printed while something is done with a :class:`Progress`."""
    file = io.StringIO()
    with Progress(Terminal(file=file, width=60), 10, 50, 3, **options) as shown:
        work(shown)
    return [line for line in file.getvalue().splitlines() if line]


def test_lines_come_while_nothing_happens_and_say_what_is_done(often):
    def work(shown):
        time.sleep(0.2)
        with shown._lock:  # one line has all three
            shown.advance(11, 1, 2.5, 64)
            shown.advance(12, 1, 1.5, 64)
            shown.advance(13, 1, float("nan"), 64)
        time.sleep(0.2)
        shown.evaluating()
        time.sleep(0.2)

    lines = printed(work)
    assert all(re.fullmatch(LINE, line) for line in lines), lines
    assert lines[0] == "step 10/50  starting"
    (figures,) = [line for line in lines if "loss" in line]
    assert figures.startswith("epoch 1/3  step 13/50  loss 2.000  ") and " left" in figures
    assert re.fullmatch(r"epoch 1/3  step 13/50  0:00:\d\d left  evaluating", lines[-1])
    assert not any(thread.name.startswith("progress") for thread in threading.enumerate())


def test_between_lines_there_is_no_line():
    assert printed(lambda shown: [shown.advance(step, 1, 1.0, 8) for step in range(11, 40)]) == []


def test_a_line_that_is_said_puts_the_next_off(monkeypatch):
    monkeypatch.setattr(records, "INTERVAL", 0.5)

    def work(shown):
        for _ in range(8):
            shown.say("accuracy [red]50 %")
            time.sleep(0.1)

    assert printed(work) == ["accuracy [red]50 %"] * 8


def test_the_time_left_is_that_of_the_steps_of_this_process(often):
    """30 steps of the 40 that were left took 3000 s: the last 10 take 1000."""

    def work(shown):
        shown._began -= 3000
        shown.advance(40, 2, 1.0, 8)
        time.sleep(0.08)

    (line,) = printed(work)
    assert line.endswith("  0:16:40 left")


def test_a_terminal_has_a_bar_and_silence_is_silent(often):
    file = io.StringIO()
    with Progress(Console(file=file, force_terminal=True, width=100), 0, 10, 2) as shown:
        time.sleep(0.15)
        shown.advance(3, 1, 1.0, 8)
        shown.show_figures(1.25, 800.0)
        shown.say("epoch 1/2  step 3")
    text = file.getvalue()
    assert "epoch 1/2  step 3\n" in text and "loss 1.250  800 images/s" in text and "starting" not in text
    with Progress(None, 0, 10, 2) as silent:
        silent.advance(1, 1, 1.0, 8)
        silent.say("nothing")
        assert silent._thread is None


def test_an_error_ends_the_lines(often):
    with pytest.raises(ValueError, match="diverged"):
        printed(lambda shown: (_ for _ in ()).throw(ValueError("diverged")))
    count = threading.active_count()
    time.sleep(0.1)
    assert threading.active_count() <= count
