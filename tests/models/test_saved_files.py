"""Files saved by earlier versions load, and give what they gave: the names of all tensors are part of the contract."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import normfree
from normfree.nn import KeptMeanConv2d, WeightLayout, standardize_module

SAVED = Path(__file__).parent / "saved"
SMALL = {"depths": (1, 1, 1, 2), "widths": (8, 8, 8, 16), "num_classes": 2, "in_channels": 1}
VARIANTS = {
    "nf_resnet50": {},
    "nf_resnet50:se": {"use_se": True},
    "nf_resnet50:centred": {"centred": True, "stem": "cifar"},
    "nf_regnet_b0": {},
    "nfnet_f0": {},
    "nfnet_f0:plain": {"use_se": False},
    "resnet50": {},
    "resnetv2_50": {"norm": "batch"},
    "skipinit_resnet50": {},
    "fixup_resnet50": {},
    "bn_regnet_b0": {},
}


def names() -> dict[str, dict[str, str]]:
    """The names of the tensors, module by module, of a small network of each family and of layers conversion makes."""
    modules: dict[str, nn.Module] = {
        variant: normfree.create_model(variant.partition(":")[0], **SMALL, **overrides)
        for variant, overrides in VARIANTS.items()
    }
    modules["kept mean"] = KeptMeanConv2d(4, 6, 3, skip_gain=0.0)
    modules["standardized module"] = nn.Conv2d(4, 6, 3)
    standardize_module(modules["standardized module"], WeightLayout(), kept_mean=True, skip_gain=0.0)
    found: dict[str, dict[str, str]] = {}
    for variant, module in modules.items():
        for path in module.state_dict():
            part, _, name = path.rpartition(".")
            previous = found.setdefault(variant, {}).get(part)
            found[variant][part] = name if previous is None else f"{previous} {name}"
    return found


def test_the_names_of_all_tensors_are_those_of_version_0_1():
    assert names() == json.loads((SAVED / "names.json").read_text())


# Logits of version 0.1 for `example()`.
LOGITS = {
    "nf_resnet50": [[-0.2086392045, 0.1377068907], [-0.2006438076, 0.1207701266]],
    "fixup_resnet50": [[-0.3934967518, -0.0537761748], [-0.3844500184, -0.0554663092]],
}


def example() -> torch.Tensor:
    return torch.sin(torch.arange(2 * 32 * 32.0)).view(2, 1, 32, 32)


@pytest.mark.parametrize("name", LOGITS)
def test_a_file_of_version_0_1_loads_and_gives_what_it_gave(name):
    model = normfree.load(SAVED / f"{name}.safetensors").eval()
    with torch.no_grad():
        logits = model(example())
    torch.testing.assert_close(logits, torch.tensor(LOGITS[name]), rtol=1e-4, atol=1e-6)
