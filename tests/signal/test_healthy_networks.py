"""Networks known to train have no error at initialisation, on noise and on photographs; known failures have one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchvision
from sklearn.datasets import load_sample_images

from normfree.models import create_model
from normfree.signal import spp

timm = pytest.importorskip("timm", reason="timm is not installed")


def photos(examples: int, size: int) -> torch.Tensor:
    """Crops of two photographs, standardised as ImageNet's are."""
    images, rng = load_sample_images().images, np.random.default_rng(0)
    crops = []
    for i in range(examples):
        image = images[i % len(images)]
        y, x = (int(rng.integers(0, length - size)) for length in image.shape[:2])
        crops.append(image[y : y + size, x : x + size])
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    scaled = torch.from_numpy(np.stack(crops)).float() / 255
    return ((scaled - mean) / std).permute(0, 3, 1, 2).contiguous()


SIZE = 96
INPUTS = {"gaussian": lambda: torch.randn(2, 3, SIZE, SIZE), "photos": lambda: photos(2, SIZE)}
ZOO = torchvision.models
HEALTHY = {
    "torchvision resnet18": ZOO.resnet18,
    "torchvision resnet50": ZOO.resnet50,
    "torchvision densenet121": ZOO.densenet121,
    "torchvision mobilenet_v3": ZOO.mobilenet_v3_small,
    "torchvision vit_b_16": lambda: ZOO.VisionTransformer(SIZE, 16, 12, 12, 768, 3072),
    "torchvision convnext_tiny": ZOO.convnext_tiny,
    "torchvision swin_t": ZOO.swin_t,
    "torchvision googlenet": lambda: ZOO.googlenet(init_weights=False),
    "timm efficientnet_b0": lambda: timm.create_model("efficientnet_b0"),
    "timm convnext_nano": lambda: timm.create_model("convnext_nano"),
    "timm regnety_004": lambda: timm.create_model("regnety_004"),
    "timm nf_resnet50": lambda: timm.create_model("nf_resnet50"),
    "nf_resnet50": lambda: create_model("nf_resnet50"),
    "resnet50": lambda: create_model("resnet50"),
    "resnetv2_50": lambda: create_model("resnetv2_50"),
    "fixup_resnet50": lambda: create_model("fixup_resnet50"),
}
SICK = {
    "resnetv2_50 without norm": (lambda: create_model("resnetv2_50", norm=None), "explosion"),
    "nf_resnet50 with plain weights": (
        lambda: create_model("nf_resnet50", conv="scaled", skipinit_gain=1, depths=(3, 24, 36, 3), width=1),
        "mean_shift",
    ),
}


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("name", HEALTHY)
def test_networks_that_train_have_no_error(name, kind):
    torch.manual_seed(0)
    spp(HEALTHY[name](), INPUTS[kind]()).assert_healthy()


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("name", SICK)
def test_networks_that_do_not_train_have_one(name, kind):
    build, sickness = SICK[name]
    torch.manual_seed(0)
    with pytest.raises(AssertionError, match=sickness):
        spp(build(), INPUTS[kind]()).assert_healthy()


def test_an_explosion_behind_zero_gains_is_a_warning():
    # SkipInit starts as its shortcuts; what its branches would do is worth a word, and no failure
    signal = spp(create_model("skipinit_resnet50", width=1, num_classes=10), torch.randn(2, 3, 64, 64))
    found = {finding.kind: finding for finding in signal.findings}
    assert found["explosion"].severity == "warning"
    assert "start them at zero" not in found["explosion"].remedy
    awake = spp(create_model("resnetv2_50", width=1, num_classes=10, norm=None), torch.randn(2, 3, 64, 64))
    assert {finding.kind: finding for finding in awake.findings}["explosion"].severity == "error"


def test_a_mean_shift_behind_zero_gains_is_a_warning():
    network = create_model("nf_resnet50", conv="scaled", depths=(3, 24, 36, 3), width=1)
    found = {each.kind: each for each in spp(network, INPUTS["gaussian"]()).findings}
    assert found["mean_shift"].severity == "warning"
