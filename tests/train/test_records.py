"""The curves of a run: whole rows only, up to the step it goes on from."""

import pytest

from normfree.train.records import Curve, read_rows


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


def test_a_full_disk_names_the_curve(tmp_path):
    curve = Curve(tmp_path / "train.csv", ("step", "loss"), 0)
    (tmp_path / "train.csv").unlink()
    (tmp_path / "train.csv").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: '.*/train\.csv'"):
        curve.add({"step": 1, "loss": 1.0})
