"""NF-RegNet against the official network's own numbers, and its signal heard from outside."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from golden import golden_case, images, load_official
from torch import nn

from normfree.models import create_model
from normfree.signal import spp


@pytest.fixture(scope="module")
def case():
    return golden_case("case04")


def official_model(case, dtype, **overrides):
    options = {"padding": "same", "drop_rate": 0.0, "stochdepth_rate": 0.0, **overrides}
    model = create_model("nf_regnet_b0", num_classes=10, width=0.25, **options)
    load_official(model, case)
    return model.to(dtype)


def relative_error(actual, expected):
    return np.abs(actual.detach().double().numpy() - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("training", [False, True])
def test_float64_agrees_to_1e10(case, training):
    model = official_model(case, torch.float64).train(training)
    x = images(case["x"], torch.float64)
    assert relative_error(model(x), case["extra/f64/logits"]) < 1e-10
    assert relative_error(model.forward_pooled(x), case["extra/f64/pool"]) < 1e-10


def test_float32_agrees_to_1e5(case):
    model = official_model(case, torch.float32).eval()
    x = images(case["x"], torch.float32)
    assert relative_error(model(x), case["logits"]) < 1e-5
    assert relative_error(model.forward_pooled(x), case["pool"]) < 1e-5


@pytest.mark.parametrize(
    ("dtype", "source", "tolerance"), [(torch.float32, "", 1e-5), (torch.float64, "extra/f64/", 1e-10)]
)
def test_signal_heard_from_outside_agrees(case, dtype, source, tolerance):
    result = spp(official_model(case, dtype), images(case["x"], dtype))
    for curve, key in {
        "avg_channel_sq_mean": "avg_sq_mean",
        "avg_channel_var": "avg_var",
        "residual_avg_channel_var": "res_avg_var",
    }.items():
        ours = [value for value in result.curve(curve) if value is not None]
        assert len(ours) == 17 - key.startswith("res")
        np.testing.assert_allclose(ours, case[f"{source}{key}"], rtol=tolerance, err_msg=curve)


@pytest.mark.parametrize(
    "overrides",
    [{"padding": "symmetric"}, {"activation": nn.SiLU()}, {"alpha": 0.21}],
    ids=["symmetric padding", "integrated gamma", "another alpha"],
)
def test_another_network_is_told_apart(case, overrides):
    model = official_model(case, torch.float64, **overrides).eval()
    assert relative_error(model(images(case["x"], torch.float64)), case["extra/f64/logits"]) > 1e-4
