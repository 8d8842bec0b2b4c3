"""Figure 3: budgets of equal multiplications, their costs, the trainings made of them, and the claims."""

import json
from dataclasses import replace

import pytest
import torch
import torchvision
from image_sets import encoded, write_parquet

from normfree.cli import main
from normfree.convert import conversion_of
from normfree.paper import budgets
from normfree.paper.budgets import (
    BN,
    BUDGETS,
    CONVERTED,
    EFFICIENT,
    NF,
    NF_AS_LONG,
    SIZE,
    arms,
    claims,
    converted_efficientnet,
    efficientnet,
    multiplications,
    networks,
)
from normfree.paper.tables import SCALES, TableSetting, config
from normfree.sources import build


@pytest.mark.parametrize("position", range(len(BUDGETS)))
def test_the_networks_of_a_budget_multiply_as_often(position):
    counts = {
        name: multiplications(build(budgets._source(model, overrides)).model, SIZE)
        for name, (model, overrides, _) in networks(position).items()
    }
    assert {EFFICIENT, BN, NF} <= set(counts)
    assert max(counts.values()) < 1.01 * min(counts.values()), counts


def test_multiplications_are_those_of_each_layer():
    """A 3×3 convolution from 3 to 4 channels on 5×5 pixels, then a linear layer of 100 to 2."""
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.Flatten(), torch.nn.Linear(100, 2))
    assert 1e6 * multiplications(model, 5) == pytest.approx(27 * 4 * 25 + 200)


def test_at_full_width_the_layers_are_efficientnet_b0s():
    ours, theirs = efficientnet(1.0), torchvision.models.efficientnet_b0(num_classes=10)
    shapes = [tuple(parameter.shape) for parameter in theirs.parameters()]
    assert [tuple(parameter.shape) for parameter in ours.parameters()] == shapes


def test_the_converted_efficientnet_has_no_norm_left():
    torch.manual_seed(0)
    assert not conversion_of(converted_efficientnet()).norms_left


def costs_of(ratio):
    return [{name: {"ratio": {"median": ratio if name == NF else 1.0}} for name in networks(i)} for i in range(3)]


def test_nf_regnets_are_also_trained_as_long_as_the_efficientnets(tmp_path):
    found = arms(costs_of(0.3), epochs=2)
    epochs = {arm.row: arm.epochs for arm in found}
    assert epochs == {EFFICIENT: None, BN: None, NF: None, NF_AS_LONG: 6, CONVERTED: None}
    assert sum(arm.row == CONVERTED for arm in found) == 1 and len(found) == 13
    runs = [config(arm, SCALES["small"], TableSetting(scale="small"), 1.0, 0, tmp_path) for arm in found]
    assert len({run.folder for run in runs}) == len(runs)
    assert {run.epochs for run in runs} == {SCALES["small"].epochs, 6}
    slower = {arm.row: arm.epochs for arm in arms(costs_of(5.0), epochs=2)}
    assert slower[NF_AS_LONG] == 1


def test_the_claims_follow_the_numbers():
    def verdicts(**accuracies):
        numbers = {EFFICIENT: 50.0, NF: 50.0, NF_AS_LONG: 50.0, CONVERTED: 47.0} | accuracies
        cells = [
            {"row": row, "column": f"budget {budget}", "runs": [{"accuracy": value}]}
            for row, value in numbers.items()
            for budget in (1, 2, 3)
        ]
        return [claim.verdict for claim in claims(cells)]

    assert verdicts() == ["agrees"] * 3
    assert verdicts(**{NF_AS_LONG: 49.9}) == ["does not agree", "agrees", "agrees"]
    assert verdicts(**{NF: 48.7}) == ["agrees", "does not agree", "agrees"]
    assert verdicts(**{CONVERTED: 49.5}) == ["agrees", "agrees", "does not agree"]


def tiny(monkeypatch):
    monkeypatch.setattr(budgets, "BATCH", 4)
    monkeypatch.setattr(budgets, "ROUNDS", {"quick": 1, "small": 1})
    monkeypatch.setattr(budgets, "BUDGETS", BUDGETS[:2])


def test_costs_are_measured_once_and_tabled(tmp_path, monkeypatch, capsys):
    tiny(monkeypatch)
    assert main(["paper", "figure3", "--out", str(tmp_path)]) == 0
    page = (tmp_path / "figure3-quick.md").read_text()
    assert "nothing is trained" in page and page.count("| EfficientNet, converted |") == 1
    stored = json.loads((tmp_path / "figure3-quick.json").read_text())
    assert [set(at_this) for at_this in stored["costs"]] == [{EFFICIENT, BN, NF}, {EFFICIENT, BN, NF, CONVERTED}]
    assert main(["paper", "figure3", "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "figure3-quick.json").read_text())["costs"] == stored["costs"]


@pytest.mark.slow
def test_every_network_trains_and_no_page_names_a_folder(tmp_path, monkeypatch):
    tiny(monkeypatch)
    monkeypatch.setitem(SCALES, "small", replace(SCALES["small"], epochs=1))
    data = tmp_path / "cifar"
    data.mkdir()
    for split, count in (("train", 256), ("test", 20)):
        images, labels = [encoded(n, 32) for n in range(count)], [n % 10 for n in range(count)]
        write_parquet(data / f"{split}.parquet", images, labels, names="abcdefghij")
    words = ["paper", "figure3", "--scale", "small", "--data", str(data), "--seeds", "1"]
    assert main([*words, "--limit-train-steps", "1", "--out", str(tmp_path)]) == 0
    stored = json.loads((tmp_path / "figure3-small.json").read_text())
    assert len(stored["cells"]) == 9
    assert {cell["model"] for cell in stored["cells"]} >= {"budgets.py:small_efficientnet", "nf_regnet_b0"}
    assert str(tmp_path) not in (tmp_path / "figure3-small.json").read_text()
