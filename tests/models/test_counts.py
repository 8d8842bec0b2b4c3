"""Parameters, arrays and multiply-accumulates of every ResNet variant, exactly as the official networks'."""

from __future__ import annotations

import json

import pytest
import torch
from golden import golden_file
from torch.utils.flop_counter import FlopCounterMode

from normfree.models import create_model

# Our name, with squeeze-excite?, the official name, parameters, arrays, multiply-accumulates at 224 pixels.
COUNTS = [
    ("nf_resnet50", False, "NF_ResNet/ResNet50/width4", 25557048, 177, 4089184256),
    ("nf_resnet50", True, "NF_ResNet/ResNet50/width4/use_se", 35635704, 241, 4099244032),
    ("resnetv2_50", False, "ResNet_BN/ResNet50/width4/preact", 25549352, 153, 4089184256),
    ("resnet50", False, "ResNet_BN/ResNet50/width4/postact", 25557032, 161, 4089184256),
    ("nf_resnet101", False, "NF_ResNet/ResNet101/width4", 44549193, 347, 7801405440),
    ("nf_resnet101", True, "NF_ResNet/ResNet101/width4/use_se", 63562505, 479, 7820378112),
    ("resnetv2_101", False, "ResNet_BN/ResNet101/width4/preact", 44541480, 306, 7801405440),
    ("resnet101", False, "ResNet_BN/ResNet101/width4/postact", 44549160, 314, 7801405440),
    ("nf_resnet152", False, "NF_ResNet/ResNet152/width4", 60192858, 517, 11513626624),
    ("nf_resnet152", True, "NF_ResNet/ResNet152/width4/use_se", 86565402, 717, 11539939328),
    ("resnetv2_152", False, "ResNet_BN/ResNet152/width4/preact", 60185128, 459, 11513626624),
    ("resnet152", False, "ResNet_BN/ResNet152/width4/postact", 60192808, 467, 11513626624),
    ("nf_resnet200", False, "NF_ResNet/ResNet200/width4", 64673898, 677, 15007481856),
    ("nf_resnet200", True, "NF_ResNet/ResNet200/width4/use_se", 93153834, 941, 15035891712),
    ("resnetv2_200", False, "ResNet_BN/ResNet200/width4/preact", 64666152, 603, 15007481856),
    ("resnet200", False, "ResNet_BN/ResNet200/width4/postact", 64673832, 611, 15007481856),
    ("nf_resnet288", False, "NF_ResNet/ResNet288/width4", 146460552, 977, 21558460416),
    ("nf_resnet288", True, "NF_ResNet/ResNet288/width4/use_se", 213422472, 1361, 21625307136),
    ("resnetv2_288", False, "ResNet_BN/ResNet288/width4/preact", 146452776, 873, 21558460416),
    ("resnet288", False, "ResNet_BN/ResNet288/width4/postact", 146460456, 881, 21558460416),
    ("nf_resnet600", False, "NF_ResNet/ResNet600/width4", 300646896, 2017, 44268519424),
    ("nf_resnet600", True, "NF_ResNet/ResNet600/width4/use_se", 440150896, 2817, 44407783424),
    ("resnetv2_600", False, "ResNet_BN/ResNet600/width4/preact", 300639016, 1809, 44268519424),
    ("resnet600", False, "ResNet_BN/ResNet600/width4/postact", 300646696, 1817, 44268519424),
    ("skipinit_resnet50", False, "SkipInit_ResNet/ResNet50/width4", 25530424, 123, 4089184256),
    ("fixup_resnet50", False, "FixUp_ResNet/ResNet50/width4", 25504026, 169, 4089184256),
    ("skipinit_resnet101", False, "SkipInit_ResNet/ResNet101/width4", 44496457, 242, 7801405440),
    ("fixup_resnet101", False, "FixUp_ResNet/ResNet101/width4", 44444049, 339, 7801405440),
]


def meta_model(name, use_se, **overrides):
    with torch.device("meta"):
        return create_model(name, **({"use_se": True} if use_se else {}), **overrides).eval()


def multiply_accumulates(model, size=224):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, size, size, device="meta"))
    return counter.get_total_flops() // 2


@pytest.mark.parametrize(("name", "use_se", "official", "parameters", "arrays", "macs"), COUNTS)
def test_parameters(name, use_se, official, parameters, arrays, macs):
    listed = list(meta_model(name, use_se).parameters())
    assert sum(parameter.numel() for parameter in listed) == parameters
    assert len(listed) == arrays


@pytest.mark.parametrize("padding", ["same", "symmetric"])
@pytest.mark.parametrize(("name", "use_se", "official", "parameters", "arrays", "macs"), COUNTS[:4] + COUNTS[-4:])
def test_multiply_accumulates(name, use_se, official, parameters, arrays, macs, padding):
    assert multiply_accumulates(meta_model(name, use_se, padding=padding)) == macs


@pytest.mark.slow
@pytest.mark.parametrize(("name", "use_se", "official", "parameters", "arrays", "macs"), COUNTS)
def test_multiply_accumulates_of_every_depth(name, use_se, official, parameters, arrays, macs):
    assert multiply_accumulates(meta_model(name, use_se)) == macs


def test_the_table_above_is_the_golden_one():
    golden = json.loads(golden_file("reference_counts.json").read_text())
    table = {official: numbers for _, _, official, *numbers in COUNTS}
    assert table == {
        name: [entry["params"], entry["n_param_arrays"], entry["traced_macs"]["224"]["total"]]
        for name, entry in golden.items()
        if "ResNet" in name
    }
