"""Before a converted model is given back it is compared with the original, by more than rounding makes of it."""

from __future__ import annotations

import pytest
import torch
from convert.nets import randomise
from torch import nn

import normfree
from normfree.convert import pipeline, verify

IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Chosen(nn.Module):
    """Its outputs have signs that rounding decides."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))

    def forward(self, x):
        y = self.body(x)
        return torch.where(y.double().mul(1e9).frac().abs() > 0.5, 1.0, -1.0) * y


def test_a_choice_that_rounding_tips_is_no_error(monkeypatch):
    model = randomise(Chosen()).eval()
    assert not normfree.convert(model, IMAGES, start="pretrained").conversion.norms_left
    monkeypatch.setattr(verify, "_jitter", lambda batch, size: batch)
    with pytest.raises(ValueError, match="Chosen gives other outputs once converted"):
        normfree.convert(model, IMAGES, start="pretrained")


def test_half_precision_inside_is_no_error(monkeypatch):
    class Cast(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 4, 1))

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return self.body(x).float()

    torch.manual_seed(0)
    model = Cast().train()
    model.body[1].momentum = None
    model(IMAGES + 30)
    converted = normfree.convert(model.eval(), IMAGES + 30, start="pretrained")
    assert not converted.conversion.norms_left
    monkeypatch.setattr(verify, "_jitter", lambda batch, size: batch)
    with pytest.raises(ValueError, match="its normalizer stays"):
        normfree.convert(model, IMAGES + 30, start="pretrained")


def test_a_norm_behind_what_went_wrong_is_not_blamed(monkeypatch):
    def misfilled(original, converted, changes, constants):
        attempts.append(filled(original, converted, changes, constants))
        converted[3].weight.data *= 1.5  # no norm's place

    filled, attempts = pipeline.fill_constants, []
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU()]
    model = randomise(nn.Sequential(*layers, nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))).eval()
    monkeypatch.setattr(pipeline, "fill_constants", misfilled)
    with pytest.raises(ValueError, match="Sequential gives other outputs once converted"):
        normfree.convert(model, IMAGES, start="pretrained")
    assert len(attempts) == 1, "a norm that is blamed stays in a second attempt"
