"""What NF-RegNet, BN-RegNet and NFNet have in common: shapes, overrides, refusals, independence, no scalars."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from watch import MapMultiplications

from normfree.models import accepted_overrides, create_model, list_models
from normfree.models.scaffold import grouped_branch

FREE = ("nf_regnet_b0", "nfnet_f0")
FAMILIES = (*FREE, "bn_regnet_b0")
QUIET = {"stochdepth_rate": 0.0, "drop_rate": 0.0}
SMALL = {"widths": (16, 24, 32, 40), "depths": (1, 2, 1, 1), **QUIET}


def meta(name, **arguments):
    with torch.device("meta"):
        return create_model(name, **arguments)


def small(name, **overrides):
    torch.manual_seed(0)
    return create_model(name, num_classes=5, **{**SMALL, **overrides})


def blocks(model):
    return [block for stage in model.stages for block in stage]


def test_the_names():
    assert list_models("nf_regnet*") == [f"nf_regnet_b{size}" for size in range(9)]
    assert list_models("bn_regnet*") == [f"bn_regnet_b{size}" for size in range(9)]
    expected = [name for size in range(8) for name in (f"nfnet_f{size}", f"nfnet_f{size}_plus")]
    assert sorted(list_models("nfnet*")) == sorted(expected)


@pytest.mark.parametrize("padding", ["same", "symmetric"])
@pytest.mark.parametrize("name", FAMILIES)
def test_full_depth_on_an_odd_oblong_image(name, padding):
    narrow = {"nf_regnet_b0": 0.2, "bn_regnet_b0": 0.2, "nfnet_f0": 0.0625}[name]
    model = create_model(name, num_classes=3, in_channels=2, padding=padding, width=narrow).train()
    x = torch.randn(2, 2, 75, 61)
    logits = model(x)
    logits.square().sum().backward()
    assert logits.shape == (2, 3)
    assert logits.isfinite().all()
    assert all(parameter.grad is not None for parameter in model.parameters())
    maps = model.forward_stages(x)
    assert [feature.stride for feature in model.feature_info] == [4, 8, 16, 32]
    for feature, tensor in zip(model.feature_info, maps, strict=True):
        expected = (2, feature.channels, math.ceil(75 / feature.stride), math.ceil(61 / feature.stride))
        assert tensor.shape == expected
        assert model.get_submodule(feature.name) is model.stages[int(feature.name[-1])]
    assert model.forward_features(x).shape == (2, model.num_features, *maps[-1].shape[2:])


@pytest.mark.parametrize("name", FAMILIES)
def test_without_classifier_the_features_come_out(name):
    model = create_model(name, num_classes=0, **SMALL).eval()
    gamma = {"nf_regnet_b0": 1.7881293296813965, "nfnet_f0": 1.7015043497085571, "bn_regnet_b0": 1}[name]
    assert model.feature_scale == gamma
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model(x), gamma * model.forward_features(x).mean((2, 3)))
    assert not any("classifier" in key for key in model.state_dict())


@pytest.mark.parametrize("name", FAMILIES)
def test_config_rebuilds_the_model(name):
    overrides = {"widths": [16, 24, 32, 32], "depths": (1, 1, 2, 1), "group_size": [4, 4, 8, 8], "se_ratio": 0.25}
    model = meta(name, num_classes=7, in_channels=1, padding="same", **overrides)
    common = {"num_classes": 7, "in_channels": 1, "padding": "same"}
    assert model.config == {"name": name, **common, **overrides}
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    assert {key: tensor.shape for key, tensor in meta(**model.config).state_dict().items()} == shapes


def test_group_size_and_expansion_by_stage():
    model = meta("nfnet_f0", group_size=(64, 128, 256, 512), expansion=(0.5, 0.25, 0.5, 1))
    found = [(stage[0].conv1.in_channels, stage[0].conv1.groups) for stage in model.stages]
    assert found == [(128, 2), (128, 1), (768, 3), (1536, 3)]
    model = meta("nf_regnet_b0", width=1, group_size=16, expansion=[1, 2, 3, 4])
    found = [(block.conv1.in_channels, block.conv1.groups) for block in blocks(model)]
    assert found[:4] == [(48, 3), (96, 6), (208, 13), (208, 13)]
    assert found[-1] == (1760, 110)


@pytest.mark.parametrize(
    ("wanted", "group_size", "groups", "channels"), [(81, 8, 10, 80), (8, 8, 1, 8), (7, 8, 1, 7), (15, 8, 1, 8)]
)
def test_a_branch_is_rounded_down_to_whole_groups(wanted, group_size, groups, channels):
    branch = grouped_branch(lambda index, in_channels, out_channels, factor: factor * in_channels, group_size, wanted)
    assert branch(0, 0, 1, 1) == (channels, groups)


@pytest.mark.parametrize("name", FAMILIES)
def test_other_activations_and_gates(name):
    model = small(name, activation=nn.LeakyReLU(0.3), se_ratio=0.25)
    if name in FREE:
        expected = (1.09 / 2 - 0.49 / (2 * math.pi)) ** -0.5
        assert blocks(model)[0].conv1.input_scale == pytest.approx(expected)
    gated = 40 if name == "nfnet_f0" else blocks(model)[-1].squeeze_excite.linear1.out_features
    assert blocks(model)[-1].squeeze_excite.linear0.out_features == gated // 4
    assert not any("squeeze" in key for key in small(name, use_se=False).state_dict())
    assert model(torch.randn(2, 3, 64, 64)).isfinite().all()


@pytest.mark.parametrize("name", FREE)
def test_examples_are_independent_and_training_equals_evaluation(name):
    model = small(name, skipinit_gain=0.5, padding="same").double().train()
    nn.init.normal_(model.classifier.weight)
    x = torch.randn(3, 3, 40, 40, dtype=torch.float64, requires_grad=True)
    logits = model(x)
    torch.testing.assert_close(logits, model.eval()(x), rtol=0, atol=0)
    (gradient,) = torch.autograd.grad(logits[1].sum(), x)
    assert gradient[1].any()
    assert not gradient[[0, 2]].any()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("use_se", [True, False])
@pytest.mark.parametrize("name", FREE)
def test_no_map_is_multiplied_but_by_a_gate(name, use_se, training):
    model = small(name, use_se=use_se, skipinit_gain=0.5).train(training)
    with MapMultiplications(batch=7) as watch:  # no convolution here has 7 filters
        model(torch.randn(7, 3, 64, 64))
    gates = [block.squeeze_excite.linear1.out_features for block in blocks(model)] if use_se else []
    assert watch.found == [((7, channels, 1, 1),) for channels in gates]


def test_the_watch_sees_a_number():
    x = torch.randn(7, 2, 3, 3)
    with MapMultiplications(batch=7) as watch:
        x.div_(2.0) * torch.tensor(3.0)
    assert watch.found == [((),), ((),)]


@pytest.mark.parametrize("name", FREE)
def test_gains_carry_gradients_through_the_folded_scales(name):
    model = small(name, skipinit_gain=0.0)
    nn.init.normal_(model.classifier.weight)
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    skip_gains = [p for name, p in model.named_parameters() if name.endswith("skip_gain")]
    assert len(skip_gains) == len(blocks(model))
    assert all(gain.grad.abs() > 0 for gain in skip_gains)


@pytest.mark.parametrize(
    ("name", "argument", "value", "rule"),
    [
        ("nf_regnet_b0", "width", 0, r"must be a finite number above 0; pass"),
        ("nf_regnet_b0", "width", 0.1, r"leaves a stage fewer than 8 channels; pass width=0.167 or more"),
        ("nfnet_f0", "widths", (8, 8, 8), r"must be 4 integers of at least 8; pass"),
        ("nfnet_f0", "base_widths", (256, 512, 1536, 7), r"must be 4 integers of at least 8; pass"),
        ("bn_regnet_b0", "depths", (1, 3, 6, 0), r"must be 4 integers of at least 1; pass"),
        ("nf_regnet_b0", "group_size", 0, r"must be an integer of at least 1; pass group_size=1"),
        ("nfnet_f0", "group_size", (64, 128), r"must be one value or one for each of the 4 stages; pass 4"),
        ("nfnet_f0", "expansion", 0, r"must be a finite number above 0; pass"),
        ("nfnet_f0", "expansion", 0.001, r"leaves a branch fewer than 2 channels; pass a larger one"),
        ("nf_regnet_b0", "expansion", (1, 2, 3), r"must be one value or one for each of the 4 stages; pass 4"),
        ("nf_regnet_b0", "alpha", -0.2, r"must be a finite number of at least 0; pass"),
        ("nfnet_f0", "skipinit_gain", math.nan, r"must be a finite number; pass"),
        ("bn_regnet_b0", "se_ratio", 0, r"must be a finite number above 0; pass"),
        ("nfnet_f0", "use_se", 1, r"must be True or False; pass use_se=True"),
        ("nf_regnet_b0", "use_se", None, r"must be True or False; pass use_se=True"),
        ("nf_regnet_b0", "activation", "sillu", r"unknown name; did you mean silu"),
        ("nfnet_f0", "drop_rate", 1.0, r"must be a number of at least 0 and below 1; pass drop_rate=0"),
        ("bn_regnet_b0", "stochdepth_rate", -0.1, r"at least 0 and below 1; pass stochdepth_rate=0"),
        ("nf_regnet_b0", "test_size", 0, r"must be an integer of at least 1; pass test_size=1"),
        ("nfnet_f0", "train_size", 192.0, r"must be an integer of at least 1; pass train_size=1"),
        ("bn_regnet_b0", "padding", "valid", r"unknown choice; choose one of 'symmetric', 'same'"),
        ("nfnet_f0", "in_channels", 0, r"must be an integer of at least 1; pass"),
        ("nf_regnet_b0", "num_classes", -1, r"must be an integer of at least 0; pass"),
    ],
)
def test_bad_values_name_argument_value_rule_and_remedy(name, argument, value, rule):
    with pytest.raises(ValueError, match=rf"^{argument}=.*{rule}") as raised:
        meta(name, **{argument: value})
    assert str(raised.value).startswith(f"{argument}={value!r}: ")


def test_the_overrides_are_listed():
    assert accepted_overrides("nfnet_f0") == accepted_overrides("nf_regnet_b0") == [
        "depths", "base_widths", "width", "widths", "group_size", "expansion", "alpha", "activation", "use_se",
        "se_ratio", "stochdepth_rate", "drop_rate", "skipinit_gain", "train_size", "test_size",
        "centred",
    ]  # fmt: skip
