"""A comparison, measured: what is in the result, what a promise makes of it, and what may go wrong."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from normfree.benchmark import Contender, Part, Target, machine_name, markdown, measure, peak_bytes

SMALL = "nf_resnet50:width=0.25,depths=(1,1,1,1)"


def part(*contenders, task="training", targets=(), **options):
    options = {"batch_size": 2, "image_size": 32, "rounds": 2, **options}
    return Part(name="small", title="Small", task=task, contenders=contenders, targets=targets, **options)


def test_training_gives_raw_times_memory_and_a_verdict():
    ours, plain = Contender(SMALL, name="ours"), Contender(SMALL, ("limit",), "limit")
    targets = [
        Target(of="ours", over="limit", at_most=1e9),
        Target(of="limit", over="ours", at_most=1.0, quantity="memory"),
        Target(of="ours", over="limit", at_most=1e-9),
    ]
    state = torch.get_rng_state()
    result = measure(part(ours, plain, targets=targets, precision="bfloat16"))
    assert torch.equal(state, torch.get_rng_state())
    assert json.loads(json.dumps(result)) == result
    found = result["contenders"]
    assert [len(found[name]["raw_seconds"]) for name in ("ours", "limit")] == [2, 2]
    assert found["ours"]["peak_bytes"] > found["limit"]["peak_bytes"] > 0  # ours has the standardised weights too
    assert [target["met"] for target in result["targets"]] == [True, True, False]
    page = markdown([result], "Page", "Remarks.")
    assert "| Small | ours / limit, time | ≤ 0.00 |" in page
    assert page.count("**missed**") == 1
    assert page.index("**missed**") < page.index("Remarks.") < page.index("## Small")


def test_inference_folded_and_by_onnx_runtime():
    contenders = [Contender(SMALL), Contender(SMALL, ("folded",)), Contender(SMALL, ("folded", "onnx"))]
    result = measure(part(*contenders, task="inference", rounds=1))
    assert list(result["contenders"]) == [SMALL, f"{SMALL}, folded", f"{SMALL}, folded, onnx"]
    assert all(found["seconds"]["median"] > 0 for found in result["contenders"].values())
    assert "peak_bytes" not in result["contenders"][SMALL]
    assert "peak memory" not in markdown([result], "Page")


def test_a_contender_that_fails_is_noted_or_raised():
    missing = Contender("timm:no_such_model", name="missing")
    compared = part(Contender(SMALL), missing, targets=[Target(of=SMALL, over="missing", at_most=1.0)])
    result = measure(compared, lenient=True)
    assert "no_such_model" in result["contenders"]["missing"]["failed"]
    assert result["targets"][0]["met"] is None
    assert "not measured" in markdown([result], "Page")
    with pytest.raises(ValueError, match="no_such_model"):
        measure(compared)


def test_peak_memory_of_a_known_sequence():
    def call():
        first = torch.zeros(1 << 18)  # 1 MiB
        second = first + 1
        del first
        return second + second  # the second and the sum

    assert peak_bytes(call) == pytest.approx(2 << 20, abs=256)  # the number 1 is a tensor for a moment


def test_activations_dominate_the_peak_of_a_convolution():
    layer, x = nn.Conv2d(3, 64, 1), torch.randn(4, 3, 64, 64)
    output = 4 * 64 * 64 * 64 * 4
    assert output <= peak_bytes(lambda: layer(x).relu()) <= 2.1 * output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "sleep"}, r"^task='sleep': unknown choice"),
        ({"precision": "int8"}, r"^precision='int8'"),
        ({"batch_size": 0}, r"^batch_size=0"),
        ({"contenders": [Contender(SMALL), Contender(SMALL)]}, r"^contenders=.*each once"),
        ({"contenders": [Contender(SMALL, ("folded",))]}, r"^steps='folded': has no training step"),
    ],
)
def test_refusals(options, message):
    contenders = options.pop("contenders", [Contender(SMALL)])
    with pytest.raises(ValueError, match=message):
        part(*contenders, **options)


def test_an_unknown_step_is_refused():
    with pytest.raises(ValueError, match=r"^steps='melted': unknown choice; choose one of 'limit'"):
        Contender(SMALL, ("melted",))


def test_a_machine_has_a_name_for_a_folder():
    assert machine_name().replace("-", "").isalnum()
    assert machine_name() == machine_name().lower()
