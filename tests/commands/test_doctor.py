"""`normfree doctor` on what its main visitor brings: nets without norms, sick, healthy, and out of its reach."""

from __future__ import annotations

import json
import re

import pytest
import torch

import normfree
from normfree.cli import main
from normfree.sources import build

FACTORIES = """
import torch
from torch import nn

X = torch.randn(8, 3, 12, 12, generator=torch.Generator().manual_seed(0))

class Block(nn.Module):
    def __init__(self, scale=1.0, std=0.15):
        super().__init__()
        self.conv, self.scale = nn.Conv2d(8, 8, 3, padding=1), scale
        nn.init.normal_(self.conv.weight, std=std)

    def forward(self, x):
        return x + self.conv(torch.relu(x)) * self.scale

def exploding():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), *(Block() for _ in range(20))), X

def fading():
    torch.manual_seed(0)
    parts = [p for i in range(12) for p in (nn.Conv2d(8 if i else 3, 8, 3, padding=1), nn.ReLU())]
    return nn.Sequential(*parts, nn.Flatten(), nn.Linear(8 * 144, 4)), X

def healthy():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), *(Block(0.2, 0.165) for _ in range(4))), X

class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        nn.init.normal_(self.attention.in_proj_weight)
        nn.init.normal_(self.attention.out_proj.weight)

    def forward(self, x):
        return x + self.attention(x, x, x, need_weights=False)[0]

def attending():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), *(Layer() for _ in range(8)), nn.Linear(16, 3)), torch.randn(4, 6, 12)

class Smooth(nn.Module):
    # Averages over all nodes but for little, so that they become alike whatever the weights are.
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(16, 16) for _ in range(6)])

    def forward(self, x):
        for layer in self.layers:
            x = torch.relu(0.9 * layer(x).mean(0, keepdim=True) + 0.1 * layer(x))
        return x

def smooth():
    torch.manual_seed(0)
    return Smooth(), torch.randn(32, 16)

class Aside(nn.Sequential):
    # Its last part does not run.
    def forward(self, x):
        for part in self[:-1]:
            x = part(x)
        return x

def aside():
    torch.manual_seed(0)
    return Aside(*healthy()[0], nn.Conv2d(8, 2, 1)), X
"""


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text(FACTORIES)

    def command(*words):
        code = main([str(word) for word in words])
        told = capsys.readouterr()
        return code, told.out + told.err

    return command


def code_in(told):
    """The lines to paste: the blocks that are indented by eight and begin with an import."""
    blocks = re.findall(r"^((?:        .*\n|\n)+)", told, re.MULTILINE)
    lines = ["\n".join(line[8:] for line in block.splitlines()) for block in blocks]
    return [block[block.index("import ") :] if "import " in block else "" for block in lines]


@pytest.mark.parametrize(("name", "count"), [("exploding", 21), ("fading", 12)])
def test_a_net_without_norms_is_converted(run, name, count, tmp_path):
    code, told = run("doctor", f"nets.py:{name}", "--out", "doctor")
    assert code == (name == "exploding"), "what fades is a warning, for it can be learned"
    assert "nothing to convert" not in told
    assert "error: output" not in told, "that its size changes is what conversion is for"
    assert re.search(
        r"^as given: (\d errors?|no error, \d warnings?) \(.*\).*; converted: no error\.$", told, re.MULTILINE
    )
    line = re.search(r"^To write the converted model: normfree (.*)$", told, re.MULTILINE)
    assert line is not None
    assert run(*line[1].split())[0] == 0
    built = build(f"nets.py:{name}")
    normfree.spp(normfree.load("model.safetensors", original=built.model), built.batch).assert_healthy()
    assert len(json.loads((tmp_path / "doctor" / "conversion.json").read_text())["changes"]) == count


@pytest.mark.parametrize("command", ["spp", "doctor"])
def test_what_was_not_measured_is_told(run, command):
    _, told = run(command, "nets.py:aside", "--out", "out")
    assert "1 layer not measured, for no row of the batch came there, or nothing ran: 5" in told
    assert "not measured" not in run(command, "nets.py:healthy", "--out", "out")[1]


def test_it_says_first_what_it_will_do_and_then_what_it_found(run):
    _, told = run("doctor", "nets.py:exploding", "--out", "doctor")
    order = (
        "Examining nets.py:exploding:",
        "  1. measure it on one batch, the factory's own, 8 × 3 × 12 × 12",
        "  2. convert a copy of it, if there is something to convert (fresh start: new weights that hold the variance "
        "without normalizers)",
        "  3. measure the converted copy on the same batch",
        "The model stays as it is. The report goes to doctor.",
        "What was found",
        "error: explosion",
        "    See normfree explain explosion\n",
        "What conversion changes",
        "Sequential converted (fresh): 21 ScaledWSConv2d; it had no normalizer that is recognised",
        "What was found in the converted model",
        "healthy: no error",
        "as given: ",
        "To write the converted model",
        "wrote doctor/spp.json",
    )
    places = [told.find(text) for text in order]
    assert -1 not in places and places == sorted(places), list(zip(order, places, strict=True))


def test_it_says_so_before_it_measures(run, monkeypatch, capsys):
    told = []

    def interrupted(*args, **options):
        told.append(capsys.readouterr().out)
        raise ValueError("model: stop here; for the test")

    monkeypatch.setattr("normfree.commands.convert.spp", interrupted)
    assert main(["doctor", "nets.py:exploding"]) == 2
    assert "Examining nets.py:exploding:" in told[0] and "The report goes to out/doctor." in told[0]


def test_of_a_healthy_net_without_norms_nothing_is_asked(run, tmp_path):
    code, told = run("doctor", "nets.py:healthy", "--out", "doctor")
    assert code == 0
    assert "as given: no error." in told
    assert (
        "Not converted: it has no normalizer that is recognised, and nothing was found that conversion would mend."
        in told
    )
    assert not (tmp_path / "doctor" / "conversion.json").exists()
    assert run("convert", "nets.py:healthy", "--out", "m.safetensors")[0] == 0, "asked for, it is converted"


def test_what_is_out_of_reach_is_told_with_lines_that_mend_it(run, tmp_path):
    code, told = run("doctor", "nets.py:attending", "--out", "doctor")
    assert code == 1
    assert (
        "Not converted: Sequential cannot be converted: it has no normalizer" in told
        and "it stands beside attention." in told
    )
    assert "normfree.convert" not in told, "it would be refused"
    lines = next(block for block in code_in(told) if block)
    built = build("nets.py:attending")
    exec(lines, {"model": built.model, "batch": built.batch})
    normfree.spp(built.model, built.batch).assert_healthy()
    page = (tmp_path / "doctor" / "report.html").read_text()
    assert "the remedy in Python" in page and "attention.out_proj.weight" in page and "normfree.convert(" not in page
    spp = json.loads((tmp_path / "doctor" / "spp.json").read_text())
    assert all("normfree.convert" not in finding["code"] for finding in spp["models"][0]["findings"])


def test_what_stays_wrong_after_conversion_is_not_told_to_convert(run):
    _, told = run("doctor", "nets.py:smooth", "--out", "doctor")
    before, after = told.split("What was found in the converted model")
    assert "normfree.convert(" in before and "normfree.convert(" not in after
    assert "warning: correlation collapse" in after and "not quite healthy: no error, " in after
    assert "See normfree explain correlation_collapse\n" in after


def test_spp_shows_each_remedy_once(run):
    _, told = run("spp", "nets.py:exploding")
    assert told.count("model = normfree.convert(model, batch)  # new weights, standardized, with gamma") == 1
    assert told.count("In Python: the same lines") == 2
    assert told.count("See normfree explain ") == len(re.findall(r"^(?:error|warning|info): ", told, re.MULTILINE))


def test_a_pretrained_start_names_the_option(run):
    _, told = run("doctor", "nets.py:exploding", "--start", "pretrained", "--out", "doctor")
    assert "pretrained start: its normalizers folded into its weights" in told
    assert "or choose --start fresh, which draws weights anew that hold the variance." in told
    assert torch.is_grad_enabled()
