"""Building by name: the list, the configuration, and what is refused."""

from __future__ import annotations

import inspect
import math
import re

import pytest
import torch
from torch import nn

import normfree
from normfree import models
from normfree.models import accepted_overrides, create_model, list_models

FAMILIES = ("fixup_resnet", "nf_resnet", "resnet", "resnetv2_", "skipinit_resnet")
DEPTHS = (50, 101, 152, 200, 288, 600)


def meta(name, **arguments):
    with torch.device("meta"):
        return create_model(name, **arguments)


def test_every_family_in_every_depth_in_natural_order():
    for family in FAMILIES:
        assert list_models(f"{family}[0-9]*") == [f"{family}{depth}" for depth in DEPTHS]
    assert list_models("no_such*") == []
    assert set(list_models("*resnet*")) <= set(list_models())


@pytest.mark.parametrize("family", FAMILIES)
def test_config_rebuilds_the_model(family):
    model = meta(f"{family}50", num_classes=7, in_channels=1, padding="same", width=1, depths=[1, 2, 1, 1])
    assert model.name == f"{family}50"
    expected = {"name": f"{family}50", "num_classes": 7, "in_channels": 1, "padding": "same"}
    assert model.config == {**expected, "width": 1, "depths": [1, 2, 1, 1]}
    twin = meta(**model.config)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert {name: tensor.shape for name, tensor in twin.state_dict().items()} == shapes
    assert [len(stage) for stage in twin.stages] == [1, 2, 1, 1]


def test_defaults_are_the_papers():
    nf, bn = meta("nf_resnet50"), meta("resnetv2_50")
    rates = [block.stochastic_depth.rate for stage in nf.stages for block in stage]
    assert rates == pytest.approx([0.1 * index / 16 for index in range(16)])
    assert nf.dropout.p == 0.25
    assert all(block.stochastic_depth.rate == 0 for stage in bn.stages for block in stage)
    assert bn.dropout.p == 0


def test_widths_and_activation_overrides():
    model = meta("nf_resnet50", widths=(24, 48, 40, 32), depths=(1, 1, 1, 1))
    assert [info.channels for info in model.feature_info] == [24, 48, 40, 32]
    assert model.stem.conv.out_channels == 6
    assert model.stages[2][0].conv1.out_channels == 10
    model = create_model("nf_resnet50", width=1, depths=(1, 1, 1, 1), activation=nn.LeakyReLU(0.3))
    assert model.stages[0][0].conv1.input_scale == pytest.approx((1.09 / 2 - 0.49 / (2 * math.pi)) ** -0.5)


@pytest.mark.parametrize("name", ["nf_resnet50", "nf_regnet_b0", "nfnet_f0", "resnet50"])
def test_a_width_beside_widths_is_refused(name):
    with pytest.raises(ValueError, match=r"^width=1: widths gives the stages' channels.*; pass one of the two"):
        create_model(name, width=1, widths=(24, 48, 40, 32))
    assert meta(name, width=1, widths=None).config["widths"] is None


def test_the_exact_gelu_is_saved_by_its_name(tmp_path):
    shape = {"widths": (8, 8, 8, 8), "depths": (1, 1, 1, 1), "skipinit_gain": 1.0}
    model = create_model("nfnet_f0", activation="gelu_exact", **shape).eval()
    again = normfree.load(normfree.save(model, tmp_path / "model.safetensors"))
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(again(x), model(x))
    assert again.config["activation"] == "gelu_exact"
    by_module = create_model("nfnet_f0", activation=nn.GELU(), **shape).eval()
    by_module.load_state_dict(model.state_dict())
    torch.testing.assert_close(by_module(x), model(x))  # the same gamma, too


def test_the_narrowest_model_runs():
    model = create_model("nf_resnet50", width=0.125, depths=(1, 1, 1, 1))
    assert model(torch.randn(1, 3, 32, 32)).isfinite().all()


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(ValueError, match=r"^name='nf_resnet5': no such model; did you mean .*nf_resnet50"):
        create_model("nf_resnet5")
    with pytest.raises(ValueError, match=r"^name=50: no such model"):
        create_model(50)
    with pytest.raises(ValueError, match=r"^name='resnet': no such model; did you mean"):
        accepted_overrides("resnet")


def test_unknown_overrides_are_answered_with_the_accepted():
    with pytest.raises(ValueError, match=r"^alfa=0.2: nf_resnet50 has no such override; it takes depths, width"):
        create_model("nf_resnet50", alfa=0.2)
    with pytest.raises(ValueError, match=r"^alpha=0.2: resnet50 has no such override; it takes "):
        create_model("resnet50", alpha=0.2)
    assert accepted_overrides("skipinit_resnet50") == [
        "depths", "width", "widths", "activation", "stochdepth_rate", "drop_rate", "skipinit_gain", "stem",
    ]  # fmt: skip
    assert accepted_overrides("nf_regnet_b0")[-1] == "centred"


@pytest.mark.parametrize(
    ("name", "argument", "value", "rule"),
    [
        ("nf_resnet50", "width", 0, r"must be a finite number above 0; pass"),
        ("nf_resnet50", "width", "4", r"must be a finite number above 0; pass"),
        ("resnet50", "width", 0.01, r"fewer than 8 channels; pass width=0.125"),
        ("resnet50", "widths", (8, 8, 8), r"must be 4 integers of at least 8; pass"),
        ("resnetv2_50", "widths", (7, 8, 8, 8), r"must be 4 integers of at least 8; pass"),
        ("nf_resnet50", "depths", (3, 4, 6), r"must be 4 integers of at least 1; pass"),
        ("nf_resnet50", "depths", (3, 4, 0, 3), r"must be 4 integers of at least 1; pass"),
        ("nf_resnet50", "depths", 50, r"must be 4 integers of at least 1; pass"),
        ("nf_resnet50", "alpha", -0.2, r"must be a finite number of at least 0; pass"),
        ("nf_resnet50", "alpha", math.inf, r"must be a finite number of at least 0; pass"),
        ("nf_resnet50", "skipinit_gain", math.nan, r"must be a finite number; pass"),
        ("skipinit_resnet50", "skipinit_gain", None, r"must be a finite number; pass"),
        ("nf_resnet50", "se_ratio", 0, r"must be a finite number above 0; pass"),
        ("nf_resnet50", "use_se", 1, r"must be True or False; pass use_se=True"),
        ("nf_resnet50", "conv", "plain", r"unknown choice; choose one of 'scaled_ws', 'scaled'"),
        ("nf_resnet50", "activation", "rellu", r"unknown name; did you mean relu"),
        ("fixup_resnet50", "activation", 3, r"must be a name or a callable; pass"),
        ("resnet50", "drop_rate", 1.0, r"must be a number of at least 0 and below 1; pass drop_rate=0"),
        ("fixup_resnet50", "stochdepth_rate", -0.1, r"at least 0 and below 1; pass stochdepth_rate=0"),
        ("resnetv2_50", "norm", "none", r"unknown choice; choose one of 'batch', .* None"),
        ("resnetv2_50", "order", "conv-act", r"unknown choice; choose one of 'norm-act', 'act-norm'"),
        ("nf_resnet50", "padding", "valid", r"unknown choice; choose one of 'symmetric', 'same'"),
        ("nf_resnet50", "num_classes", -1, r"must be an integer of at least 0; pass"),
        ("nf_resnet50", "num_classes", 2.0, r"must be an integer of at least 0; pass"),
        ("resnet50", "in_channels", 0, r"must be an integer of at least 1; pass"),
    ],
)
def test_bad_values_name_argument_value_rule_and_remedy(name, argument, value, rule):
    with pytest.raises(ValueError, match=rf"^{argument}=.*{rule}") as raised:
        meta(name, **{argument: value})
    assert str(raised.value).startswith(f"{argument}={value!r}: ")


class InplaceReLU(nn.Module):
    def forward(self, x):
        return x.relu_()


def test_an_activation_that_would_corrupt_the_shortcut_is_refused():
    with pytest.raises(ValueError, match=r"^activation=InplaceReLU\(\): must not work in place; pass"):
        meta("nf_resnet50", activation=InplaceReLU())


def test_no_file_of_families_imports_another():
    members = [
        value for value in vars(models).values() if inspect.isclass(value) and issubclass(value, models.Backbone)
    ]
    files = {inspect.getmodule(family) for family in members if family is not models.Backbone}
    names = {file.__name__ for file in files}
    assert len(names) == 3
    for file in files:
        assert not names & set(re.findall(r"^from (normfree\.models\.\w+) import", inspect.getsource(file), re.M)), file
