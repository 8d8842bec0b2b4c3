"""Parameters, arrays and multiply-accumulates of every NF-RegNet and NFNet, exactly as the official networks'."""

from __future__ import annotations

import json

import pytest
import torch
from golden import golden_file
from torch.utils.flop_counter import FlopCounterMode

from normfree.models import create_model, list_models

# Our name, the official name, parameters, arrays, multiply-accumulates at the training and the test size.
COUNTS = [
    ("nf_regnet_b0", "NF_RegNet/B0/width0.75", 8595372, 244, {192: 327149536, 224: 443672488}),
    ("nf_regnet_b1", "NF_RegNet/B1/width0.75", 10019208, 300, {224: 562813864, 256: 733522624}),
    ("nf_regnet_b2", "NF_RegNet/B2/width0.75", 13785904, 328, {240: 897946824, 272: 1145075772}),
    ("nf_regnet_b3", "NF_RegNet/B3/width0.75", 18136667, 370, {288: 1621118328, 320: 1999206624}),
    ("nf_regnet_b4", "NF_RegNet/B4/width0.75", 29315830, 440, {320: 3106822976, 384: 4467269888}),
    ("nf_regnet_b5", "NF_RegNet/B5/width0.75", 48707138, 552, {384: 7496250368, 456: 11097831488}),
    ("nf_regnet_b6", "NF_RegNet/B6/width0.75", 70045805, 622, {448: 14183144848, 528: 20136927784}),
    ("nf_regnet_b7", "NF_RegNet/B7/width0.75", 101743204, 748, {512: 27283033088, 600: 38161054592}),
    ("nf_regnet_b8", "NF_RegNet/B8/width0.75", 142314441, 846, {600: 51805389336, 672: 63719342484}),
    ("nfnet_f0", "NFNet/F0/width1.0", 71489284, 233, {192: 6977003520, 256: 12384198656}),
    ("nfnet_f1", "NFNet/F1/width1.0", 132634256, 437, {224: 17437921280, 320: 35538968576}),
    ("nfnet_f2", "NFNet/F2/width1.0", 193779228, 641, {256: 33139318784, 352: 62592978944}),
    ("nfnet_f3", "NFNet/F3/width1.0", 254924200, 845, {320: 67944292352, 416: 114763501568}),
    ("nfnet_f4", "NFNet/F4/width1.0", 316069172, 1049, {384: 121122250752, 512: 215241187328}),
    ("nfnet_f5", "NFNet/F5/width1.0", 377214144, 1253, {416: 169498382336, 544: 289757106176}),
    ("nfnet_f6", "NFNet/F6/width1.0", 438359116, 1457, {448: 228292861952, 576: 377280307200}),
    ("nfnet_f7", "NFNet/F7/width1.0", 499504088, 1661, {480: 298476539904, 608: 478781640704}),
    ("nfnet_f0_plus", "NFNet/F0+/width1.0", 118824516, 233, {192: 10999005184, 256: 19520208896}),
    ("nfnet_f1_plus", "NFNet/F1+/width1.0", 220357008, 437, {224: 27210002432, 320: 55445012480}),
    ("nfnet_f2_plus", "NFNet/F2+/width1.0", 321889500, 641, {256: 51508625408, 352: 97275441152}),
    ("nfnet_f3_plus", "NFNet/F3+/width1.0", 423421992, 845, {320: 105382952960, 416: 177986514944}),
    ("nfnet_f4_plus", "NFNet/F4+/width1.0", 524954484, 1049, {384: 187619000320, 512: 333389742080}),
    ("nfnet_f5_plus", "NFNet/F5+/width1.0", 626486976, 1253, {416: 262327709696, 544: 448426520576}),
    ("nfnet_f6_plus", "NFNet/F6+/width1.0", 728019468, 1457, {448: 353101611008, 576: 583517274112}),
    ("nfnet_f7_plus", "NFNet/F7+/width1.0", 829551960, 1661, {480: 461436497920, 608: 740157796352}),
]
QUICK = [row for row in COUNTS if row[0] in ("nf_regnet_b0", "nf_regnet_b2", "nfnet_f0", "nfnet_f0_plus")]


def meta_model(name, **overrides):
    with torch.device("meta"):
        return create_model(name, **overrides).eval()


def multiply_accumulates(model, size):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, size, size, device="meta"))
    return counter.get_total_flops() // 2


@pytest.mark.parametrize(("name", "official", "parameters", "arrays", "macs"), COUNTS)
def test_parameters_and_image_sizes(name, official, parameters, arrays, macs):
    model = meta_model(name)
    listed = list(model.parameters())
    assert sum(parameter.numel() for parameter in listed) == parameters
    assert len(listed) == arrays
    assert [model.train_size, model.test_size] == list(macs)
    assert model.image_size == model.test_size


@pytest.mark.parametrize("padding", ["same", "symmetric"])
@pytest.mark.parametrize(("name", "official", "parameters", "arrays", "macs"), QUICK)
def test_multiply_accumulates(name, official, parameters, arrays, macs, padding):
    model = meta_model(name, padding=padding)
    assert {size: multiply_accumulates(model, size) for size in macs} == macs


@pytest.mark.slow
@pytest.mark.parametrize(("name", "official", "parameters", "arrays", "macs"), COUNTS)
def test_multiply_accumulates_of_every_size(name, official, parameters, arrays, macs):
    model = meta_model(name)
    assert multiply_accumulates(model, model.test_size) == macs[model.test_size]


@pytest.mark.parametrize("size", range(9))
def test_batch_norms_cost_what_gains_and_biases_do(size):
    """A scale and an offset per channel for a gain and a bias, and a skip gain less per block."""
    normalized, free = meta_model(f"bn_regnet_b{size}"), meta_model(f"nf_regnet_b{size}")
    parameters, expected = (sum(p.numel() for p in model.parameters()) for model in (normalized, free))
    assert parameters == expected - sum(len(stage) for stage in free.stages)
    assert normalized.image_size == free.image_size


def test_the_graphs_of_both_regnets_cost_the_same():
    macs = [multiply_accumulates(meta_model(f"{family}_b0"), 224) for family in ("bn_regnet", "nf_regnet")]
    assert macs[0] == macs[1]


def test_the_table_above_is_the_golden_one():
    golden = json.loads(golden_file("reference_counts.json").read_text())
    table = {official: numbers for _, official, *numbers in COUNTS}
    assert table == {
        name: [
            entry["params"],
            entry["n_param_arrays"],
            {int(size): macs["total"] for size, macs in entry["traced_macs"].items()},
        ]
        for name, entry in golden.items()
        if name.startswith(("NF_RegNet/", "NFNet/"))
    }
    assert {name for name, *_ in COUNTS} == {*list_models("nf_regnet*"), *list_models("nfnet*")}
