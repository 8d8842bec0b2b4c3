"""The authors' own network and numbers, heard from outside: nothing in the model helps the recorder."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from golden import golden_case, images, load_official

from normfree.models import create_model
from normfree.signal import spp


@pytest.fixture(scope="module")
def case():
    return golden_case("case01")


@pytest.mark.parametrize("image", ["", "odd/"], ids=["64 pixels", "75 by 61 pixels"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_of_the_official_network(case, dtype, image):
    """Official float32 statistics are float32 sums; ours of the same network agree to their rounding."""
    model = create_model("nf_resnet50", num_classes=10, width=1, padding="same", drop_rate=0.0, stochdepth_rate=0.0)
    load_official(model, case)
    source = f"extra/{image}" if image else ""
    result = spp(model.to(dtype), images(case[f"{source}x"], dtype))
    expected, tolerance = source, 1e-5
    if dtype == torch.float64:
        expected, tolerance = f"extra/f64/{image}", 1e-10
    for curve, key in {
        "avg_channel_sq_mean": "avg_sq_mean",
        "avg_channel_var": "avg_var",
        "residual_avg_channel_var": "res_avg_var",
    }.items():
        official = case[f"{expected}{key}"]
        ours = [value for value in result.curve(curve) if value is not None]
        assert len(ours) == len(official) == 17 - key.startswith("res")
        np.testing.assert_allclose(ours, official, rtol=tolerance, err_msg=curve)
