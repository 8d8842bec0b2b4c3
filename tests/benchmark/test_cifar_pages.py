"""The pages of the CIFAR-10 benchmarks are what their commands make of the numbers beside them."""

import json
from pathlib import Path

import pytest

RESULTS = Path(__file__).parents[2] / "results"


@pytest.mark.parametrize("name", ["cifar", "cifar_muon"])
def test_page_is_made_of_the_numbers(benchmarks, name):
    numbers = json.loads((RESULTS / name / f"{name}.json").read_text(encoding="utf-8"))
    assert benchmarks(name).table(numbers) == (RESULTS / name / "README.md").read_text(encoding="utf-8")


def test_every_probe_has_a_name_of_its_own(benchmarks):
    names = [probe.name for probe in benchmarks("cifar_muon").PROBES]
    assert len(set(names)) == len(names)
