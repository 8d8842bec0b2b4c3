"""The stem for small images: no stride, no pool, and everything after it as before."""

import pytest
import torch

from normfree.models import create_model
from normfree.signal import spp

FAMILIES = ("nf_resnet50", "resnet50", "resnetv2_50", "skipinit_resnet50", "fixup_resnet50")
SMALL = {"widths": (16, 32, 32, 48), "depths": (1, 2, 1, 1), "num_classes": 10}


@pytest.mark.parametrize("name", FAMILIES)
def test_an_image_keeps_its_size_through_the_stem(name):
    model = create_model(name, stem="cifar", **SMALL).eval()
    x = torch.randn(2, 3, 32, 32)
    assert model.stem(x).shape == (2, 4, 32, 32)
    assert [info.stride for info in model.feature_info] == [1, 2, 4, 8]
    for info, features in zip(model.feature_info, model.forward_stages(x), strict=True):
        assert features.shape == (2, info.channels, 32 // info.stride, 32 // info.stride)
    assert model(x).shape == (2, 10)


@pytest.mark.parametrize("name", FAMILIES)
def test_only_the_stem_differs(name):
    usual, small = (create_model(name, stem=stem, **SMALL).state_dict() for stem in ("imagenet", "cifar"))
    different = {key for key, tensor in usual.items() if small[key].shape != tensor.shape}
    assert usual.keys() == small.keys()
    assert different == {"stem.conv.weight"}
    assert small["stem.conv.weight"].shape == (4, 3, 3, 3)


def test_fixup_draws_the_stem_for_its_own_fan_out():
    torch.manual_seed(0)
    weight = create_model("fixup_resnet50", stem="cifar", width=16).stem.conv.weight
    fan_out = 256 * 9  # filters times taps
    assert weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)


def test_the_plan_holds_after_it():
    torch.manual_seed(0)
    model = create_model("nf_resnet50", stem="cifar", skipinit_gain=1.0, width=2, depths=(2, 2, 2, 2))
    for block in spp(model, torch.randn(16, 3, 32, 32)).blocks:
        assert block.avg_channel_var == pytest.approx(block.expected_var, rel=0.25)


def test_the_config_rebuilds_it():
    model = create_model("nf_resnet50", stem="cifar", **SMALL)
    assert create_model(**model.config).stem.conv.stride == (1, 1)


def test_an_unknown_stem_is_refused():
    with pytest.raises(ValueError, match=r"stem='patchify'.*'imagenet', 'cifar'"):
        create_model("nf_resnet50", stem="patchify")
