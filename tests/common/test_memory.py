"""What the system says is free, from files as Linux writes them."""

from __future__ import annotations

import pytest

from normfree.common.checks import available_memory

MACHINE = "MemTotal:       16000000 kB\nMemAvailable:    8000000 kB\n"


def system(root, *, limit: str | None = None, used: int = 0, cached: int = 0):
    (root / "proc").mkdir()
    (root / "proc/meminfo").write_text(MACHINE)
    if limit is not None:
        group = root / "sys/fs/cgroup"
        group.mkdir(parents=True)
        (group / "memory.max").write_text(limit + "\n")
        (group / "memory.current").write_text(f"{used}\n")
        (group / "memory.stat").write_text(f"anon 1\ninactive_file {cached}\n")
    return root


def test_the_machine(tmp_path):
    assert available_memory(system(tmp_path)) == 8_000_000 * 1024


@pytest.mark.parametrize(
    ("limit", "expected"),
    [("max", 8_000_000 * 1024), ("4000000000", 4_000_000_000 - 3_000_000_000 + 500_000_000), ("2000000000", 0)],
)
def test_a_container(tmp_path, limit, expected):
    assert available_memory(system(tmp_path, limit=limit, used=3_000_000_000, cached=500_000_000)) == expected


def test_where_the_system_does_not_say(tmp_path):
    assert available_memory(tmp_path) is None
