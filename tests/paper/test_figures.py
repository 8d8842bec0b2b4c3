"""The figures' machinery, and their predictions on small networks."""

import json
from dataclasses import replace

import pytest

from normfree.cli import main
from normfree.paper.figures import (
    BN_FIRST,
    FIGURES,
    FigureSetting,
    Prediction,
    make,
    mean_padding_growth,
    padding_share,
)

SMALL = FigureSetting(scale="quick", image_size=32, batch_size=2, seeds=1)


def test_padding_share_is_the_papers():
    # S = 32, 16, 8, 4 at 128 px; the three last stand in the paper's appendix of facts as 0.918, 0.840, 0.694
    assert [round(padding_share(128, stage), 3) for stage in (1, 2, 3)] == [0.918, 0.840, 0.694]


def test_padding_growth_is_a_mean_over_blocks():
    assert mean_padding_growth((1, 0, 0, 2), 128) == pytest.approx(1 + padding_share(128, 3))


def test_a_predictions_interval_reads_as_what_it_is():
    def interval(low: float, high: float) -> str:
        return Prediction(text="", label="", low=low, high=high, measure=lambda signal: 0.0).interval

    assert interval(0.0, 0.02) == "≤ 0.02"
    assert interval(1.0, float("inf")) == "≥ 1"
    assert interval(1.9, 2.1) == "1.9 … 2.1"


@pytest.mark.parametrize("figure", FIGURES.values(), ids=FIGURES)
def test_every_prediction_is_about_a_network_of_its_figure(figure):
    labels = [network.label for network in figure.networks]
    assert len(set(labels)) == len(labels)
    assert {prediction.label for prediction in figure.predictions(FigureSetting())} <= set(labels)


@pytest.mark.parametrize(("size", "batch"), [(128, 4), (32, 8)])  # of 32 px the last maps are single pixels
@pytest.mark.parametrize("name", FIGURES)
def test_the_command_writes_png_json_and_note_that_agree(name, size, batch, tmp_path, capsys):
    words = ["paper", name, "--scale", "quick", "--image-size", str(size), "--batch-size", str(batch), "--seeds", "1"]
    assert main([*words, "--out", str(tmp_path)]) == 0
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    apart = {"figure1": ["figure1_unnormalised.png"], "figure2": []}[name]
    assert sorted(path.name for path in tmp_path.glob("*.png")) == [f"{name}.png", *apart]
    document = json.loads((tmp_path / f"{name}.json").read_text())
    figure = FIGURES[name]
    assert [model["model"] for model in document["models"]] == [network.label for network in figure.networks]
    assert all(len(model["blocks"]) == 24 for model in document["models"])
    note = (tmp_path / f"{name}.md").read_text()
    predictions = figure.predictions(FigureSetting(scale="quick", image_size=size, batch_size=batch, seeds=1))
    assert note.count("| agrees |") == len(predictions), note


def test_a_wrong_prediction_is_said_to_differ(tmp_path):
    wrong = Prediction(text="variance 7", label=BN_FIRST, low=6.9, high=7.1, measure=lambda s: 0.7)
    figure = replace(FIGURES["figure1"], networks=FIGURES["figure1"].networks[:1], predictions=lambda setting: [wrong])
    paths = make(figure, SMALL, tmp_path, lambda text: None)
    assert "| 0.7 | **differs** |" in paths[-1].read_text()


def test_bad_settings_are_one_line(tmp_path, capsys):
    assert main(["paper", "figure1", "--seeds", "0", "--out", str(tmp_path)]) == 2
    assert "--seeds=0: must be an integer of at least 1" in capsys.readouterr().err
