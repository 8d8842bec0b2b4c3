"""Every attack of the fault drill holds; and the drill notices one that does not."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.attacks import ATTACKS, CANARY, REFUSED, WORKS, Attack, outcome, prepare


@pytest.fixture(scope="module", autouse=True)
def ground(tmp_path_factory):
    """The run and the model that attacks copy."""
    prepare(tmp_path_factory.mktemp("ground"))


@pytest.mark.parametrize("name", ATTACKS)
def test_attack(name, tmp_path):
    assert outcome(ATTACKS[name], tmp_path) == "held"


def failing(text, promise=REFUSED, names=""):
    """An attack whose call runs some code."""
    return Attack("code", "own", promise, lambda folder: lambda: exec(text), names)


@pytest.mark.parametrize(
    ("attack", "found"),
    [
        (failing(f"open({CANARY!r}, 'w').close()"), "code was run"),
        (failing("raise RuntimeError('x')"), "traceback"),
        (failing("pass"), "silently wrong"),
        (failing("raise ValueError('\\x1b[31m')"), "control characters"),
        (failing("raise ValueError('a' * 600)"), "not one short line"),
        (failing("raise ValueError('two\\nlines')"), "not one short line"),
        (failing("raise ValueError('b')", names="file"), "does not name"),
        (failing("raise ValueError('b')", WORKS), "refused what is right"),
        (failing("raise ValueError('the file')", names="file"), "held"),
        (failing("pass", WORKS), "held"),
    ],
)
def test_the_drill_tells_what_went_wrong(attack, found, tmp_path):
    assert outcome(attack, tmp_path).startswith(found)


def test_the_drill_ends_a_hang(tmp_path, monkeypatch):
    monkeypatch.setitem(outcome.__globals__, "SECONDS", 0.2)  # by name, another import of the module could be meant
    assert outcome(failing("import time; time.sleep(5)"), tmp_path) == "hang"
    swallowed = "import time\ntry: time.sleep(5)\nexcept BaseException: pass"
    assert outcome(failing(swallowed), tmp_path) == "hang"
