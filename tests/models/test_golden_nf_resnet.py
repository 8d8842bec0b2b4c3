"""NF-ResNet against the official network's own numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from golden import golden_case, images, load_official

from normfree.models import create_model


@pytest.fixture(scope="module")
def case():
    return golden_case("case01")


def official_model(case, dtype):
    model = create_model("nf_resnet50", num_classes=10, width=1, padding="same", drop_rate=0, stochdepth_rate=0)
    load_official(model, case)
    return model.to(dtype)


def relative_error(actual, expected):
    return np.abs(actual.detach().double().numpy() - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("odd", ["", "odd/"])
@pytest.mark.parametrize("training", [False, True])
def test_float64_agrees_to_1e10(case, odd, training):
    model = official_model(case, torch.float64).train(training)
    x = images(case["extra/odd/x" if odd else "x"], torch.float64)
    assert relative_error(model(x), case[f"extra/f64/{odd}logits"]) < 1e-10
    assert relative_error(model.forward_pooled(x), case[f"extra/f64/{odd}pool"]) < 1e-10


@pytest.mark.parametrize("prefix", ["", "extra/odd/"])
def test_float32_agrees_to_1e5(case, prefix):
    model = official_model(case, torch.float32).eval()
    x = images(case[f"{prefix}x"], torch.float32)
    assert relative_error(model(x), case[f"{prefix}logits"]) < 1e-5


def test_signal_after_every_block_agrees(case):
    model = official_model(case, torch.float64).eval()
    x = model.stem(images(case["x"], torch.float64))
    squared_means, variances = [], []
    with torch.no_grad():
        for block in [torch.nn.Identity(), *(block for stage in model.stages for block in stage)]:
            x = block(x)
            squared_means.append(x.mean((0, 2, 3)).square().mean())
            variances.append(x.var((0, 2, 3), correction=0).mean())
    assert relative_error(torch.stack(squared_means), case["extra/f64/avg_sq_mean"]) < 1e-10
    assert relative_error(torch.stack(variances), case["extra/f64/avg_var"]) < 1e-10


def test_symmetric_padding_is_another_network(case):
    model = create_model("nf_resnet50", num_classes=10, width=1, drop_rate=0, stochdepth_rate=0)
    load_official(model, case)
    assert relative_error(model(images(case["x"], torch.float32)), case["logits"]) > 1e-2
