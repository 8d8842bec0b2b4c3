"""The paper's tables: their arms are runs that can be made, their claims follow the numbers, finished runs are kept."""

import json

import pytest
import torch
from torch import nn

from normfree.cli import main
from normfree.models import create_model
from normfree.paper import properties, tables
from normfree.paper.properties import EQUAL, make_gamma, make_properties
from normfree.paper.tables import SCALES, TABLES, TableSetting, claims_of_table1, claims_of_table2, config


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("table", TABLES)
def test_every_arm_is_a_run_and_no_two_share_a_folder(table, scale, tmp_path):
    arms = TABLES[table].arms(SCALES[scale])
    runs = [
        config(arm, SCALES[scale], TableSetting(scale=scale), rate, 0, tmp_path) for arm in arms for rate in (0.5, 1.0)
    ]
    assert len({run.folder for run in runs}) == len(runs) == 2 * len(arms)
    assert runs[1].optimizer.learning_rate == 2 * runs[0].optimizer.learning_rate


def test_every_network_of_an_arm_tells_two_images_apart(tmp_path):
    """One at a time, too, as the last of an odd number is evaluated at a batch of two; its last maps are one pixel."""
    images = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for table in TABLES.values():
        for arm in table.arms(SCALES["quick"]):
            run = config(arm, SCALES["quick"], TableSetting(), 1.0, 0, tmp_path)
            torch.manual_seed(0)
            network = create_model(run.model_name, num_classes=10, in_channels=1, **run.model_overrides).eval()
            with torch.no_grad():
                nn.init.normal_(network.classifier.weight)  # FixUp's is zero to begin with
                first, second = (network(image[None]) for image in images)
            assert float((first - second).norm() / first.norm()) > 1e-3, run.name


def test_the_table_of_batch_sizes_trains_on_a_share_of_the_training_images_and_tests_on_all(tmp_path):
    arm = TABLES["table2"].arms(SCALES["small"])[0]
    run = config(arm, SCALES["small"], TableSetting(scale="small"), 1.0, 0, tmp_path)
    assert (run.data.holdout, run.data.evaluation_split) == (pytest.approx(0.6), "test")


def cells(**accuracies):
    return [
        {"row": row.replace("_", ", "), "column": column, "runs": [{"accuracy": value}]}
        for row, values in accuracies.items()
        for column, value in values.items()
    ]


def table1_cells(bn=90.0, nf=90.0, skipinit=88.0, fixup=87.0, without=10.0):
    named = {"BatchNorm": bn, "NF": nf, "SkipInit": skipinit, "FixUp": fixup, "unnormalised": without}
    both = {name: {"29 layers": value} for name, value in named.items()}
    return cells(**both, **{f"{name}_regularised": values for name, values in both.items()})


@pytest.mark.parametrize(
    ("numbers", "verdicts"),
    [
        ({}, ["agrees"] * 4),
        ({"nf": 89.8}, ["agrees"] * 4),
        ({"nf": 89.6}, ["does not agree", "agrees", "agrees", "agrees"]),
        ({"skipinit": 90.1}, ["agrees", "does not agree", "agrees", "agrees"]),
        ({"fixup": 90.1}, ["agrees", "agrees", "does not agree", "agrees"]),
        ({"without": 46.0}, ["agrees", "agrees", "agrees", "does not agree"]),
    ],
)
def test_the_claims_of_table1_follow_the_numbers(numbers, verdicts):
    found = claims_of_table1(table1_cells(**numbers), SCALES["small"])
    assert [claim.verdict for claim in found] == verdicts


def test_digits_decide_no_claim_about_accuracies():
    found = claims_of_table1(table1_cells(), SCALES["quick"])
    assert [claim.verdict for claim in found[:3]] == ["cannot be tested at this scale"] * 3


def test_the_claims_of_table2_follow_the_numbers():
    def verdicts(nf, bn):
        sizes = ("batch 2", "batch 128", "batch 1024")
        found = cells(NF=dict(zip(sizes, nf, strict=True)), BatchNorm=dict(zip(sizes, bn, strict=True)))
        return [claim.verdict for claim in claims_of_table2(found, SCALES["small"])]

    assert verdicts((70, 70.5, 60), (50, 61, 60)) == ["agrees", "agrees", "agrees"]  # of 60 only the first tells
    assert verdicts((69, 70.5, 60), (62, 71, 60)) == ["does not agree"] * 3


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("table", TABLES)
def test_every_table_has_its_claims_at_every_scale(table, scale):
    arms = TABLES[table].arms(SCALES[scale])
    cells = [{"row": arm.row, "column": arm.column, "runs": [{"accuracy": 50.0}]} for arm in arms]
    claims = TABLES[table].claims(cells, SCALES[scale])
    assert bool(claims) == (table != "ablation")
    assert not any(claim.verdict == "agrees" for claim in claims if "points" not in claim.ours)


def test_a_table_is_written_and_its_finished_runs_are_not_repeated(tmp_path, monkeypatch, capsys):
    real = tables.train
    few = [arm for arm in TABLES["normalizers"].arms(SCALES["quick"]) if arm.row in ("NF", "BatchNorm")]
    monkeypatch.setitem(
        TABLES,
        "normalizers",
        tables.Table(name="normalizers", title="t", arms=lambda scale: few, claims=TABLES["normalizers"].claims),
    )
    monkeypatch.setitem(SCALES, "quick", tables.dataclasses.replace(SCALES["quick"], epochs=1, rates=(1.0,)))
    words = ["paper", "normalizers", "--seeds", "2", "--out", str(tmp_path)]
    assert main(words) == 0
    stored = json.loads((tmp_path / "normalizers-quick.json").read_text())
    assert [len(cell["runs"]) for cell in stored["cells"]] == [2, 2]
    assert {"cpu", "torch", "commit"} <= set(stored["provenance"])
    page = (tmp_path / "normalizers-quick.md").read_text()
    assert "| NF | " in page and "cannot be tested at this scale" in page
    times = {path: path.stat().st_mtime for path in tmp_path.glob("runs/*/*/model.safetensors")}
    assert len(times) == 4
    assert main(words) == 0
    assert {path: path.stat().st_mtime for path in tmp_path.glob("runs/*/*/model.safetensors")} == times
    assert json.loads((tmp_path / "normalizers-quick.json").read_text())["cells"] == stored["cells"]
    opened = []
    monkeypatch.setattr(tables, "train", lambda run, **options: opened.append(run) or real(run, **options))
    assert main(words) == 0 and not opened, "nor are their data opened again"
    limit = json.loads(next(tmp_path.glob("runs/*/*/metrics.json")).read_text())["step"] + 1
    assert main([*words, "--limit-train-steps", str(limit)]) == 0 and not opened
    assert main([*words, "--limit-train-steps", "1"]) == 0 and len(opened) == 4, "these are not the runs asked for"
    rehearsal = (tmp_path / "normalizers-quick-rehearsal.md").read_text()
    assert "`normfree paper normalizers --scale quick --seeds 2 --limit-train-steps 1`" in rehearsal
    assert (tmp_path / "normalizers-quick.md").read_text() == page


def test_gamma_is_the_integral_beside_the_official_constants(tmp_path):
    page = make_gamma(tmp_path)[-1].read_text()
    assert "| relu | 1.712858550 | 1.713958859 | +6.4e-04 |" in page and "does not agree" not in page


@pytest.mark.slow
def test_properties_hold_without_normalizers_and_not_with_batchnorm(tmp_path, monkeypatch):
    monkeypatch.setattr(properties, "SIZE", 32)
    monkeypatch.setattr(properties, "BATCH", 8)
    rows = json.loads(make_properties(tmp_path)[0].read_text())
    by_name = {row["property"]: row for row in rows}
    assert all(row["nf"] <= EQUAL for row in rows if row["equal"])
    differing = [row["property"] for row in rows if row["equal"] and row["bn"] > 1e-2]
    assert len(differing) == 5  # all but the number of threads
    memory = by_name["less is kept for the backward pass (MiB an image)"]
    assert memory["nf"] < 0.7 * memory["bn"]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["table1", "--image-size", "64"], "--image-size"),
        (["gamma", "--scale", "full"], "--scale"),
        (["figure1", "--data", "x"], "--data"),
        (["figure1", "--scale", "small"], "--scale"),
        (["table1", "--seeds", "0"], "seeds"),
        (["table1", "--data", "nowhere"], "data"),
    ],
)
def test_what_does_not_apply_is_one_line(words, named, tmp_path, capsys):
    assert main(["paper", *words, "--out", str(tmp_path)]) == 2
    assert named in capsys.readouterr().err
