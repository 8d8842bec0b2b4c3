"""Every family under torchvision's heads: shapes, what the levels are, and a training step at batch 1."""

from __future__ import annotations

import math
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.detection import RetinaNet
from torchvision.models.segmentation.deeplabv3 import ASPPPooling, DeepLabHead
from torchvision.models.segmentation.fcn import FCN, FCNHead
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from normfree.models import FeaturePyramidBackbone, create_model
from normfree.nn import ScaledWSConv2d

GROUPED = {"widths": (16, 24, 32, 40)}
FAMILIES = {
    "nf_resnet50": {"width": 0.5},
    "resnet50": {"width": 0.5},
    "resnetv2_50": {"width": 0.5},
    "skipinit_resnet50": {"width": 0.5},
    "fixup_resnet50": {"width": 0.5},
    "nf_regnet_b0": GROUPED,
    "nfnet_f0": GROUPED,
    "bn_regnet_b0": GROUPED,
}


def small(name, **overrides):
    torch.manual_seed(0)
    return create_model(name, **{"depths": (1, 2, 1, 1), "stochdepth_rate": 0.0, **FAMILIES[name], **overrides})


def step(model, output):
    """The loss's backward pass reaches every parameter."""
    output.square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("name", FAMILIES)
def test_levels_are_what_the_next_block_sees(name):
    ended = name in ("resnet50", "fixup_resnet50")  # post-activation: nothing is left to do
    model = small(name, **({"activation": "silu"} if ended else {})).eval()
    body = FeaturePyramidBackbone(model).eval()
    x = torch.randn(1, 3, 75, 61)
    levels = body(x)
    assert list(levels) == ["0", "1", "2", "3"]
    act = {"nf_regnet_b0": F.silu, "bn_regnet_b0": F.silu, "nfnet_f0": lambda x: F.gelu(x, approximate="tanh")}
    for level, info, bare, tensor in zip(
        body.levels, model.feature_info, model.forward_stages(x), levels.values(), strict=True
    ):
        assert (level.channels, level.stride) == (info.channels, info.stride)
        assert tensor.shape == (1, level.channels, math.ceil(75 / level.stride), math.ceil(61 / level.stride))
        if name == "resnetv2_50":  # normalised first: in evaluation, at initialisation, by (0 mean, 1 variance)
            bare = bare / math.sqrt(1 + 1e-5)
        torch.testing.assert_close(tensor, bare if ended else act.get(name, F.relu)(bare))
    bare = FeaturePyramidBackbone(model, activated=False)(x)
    for one, other in zip(bare.values(), model.forward_stages(x), strict=True):
        assert torch.equal(one, other)


def test_names_and_parameters_are_the_models_without_what_is_not_used():
    model = small("nf_regnet_b0")
    body = FeaturePyramidBackbone(model, out_indices=[0, 2], names=["low", "high"])
    assert [level.name for level in body.levels] == list(body(torch.randn(1, 3, 64, 64))) == ["low", "high"]
    state = model.state_dict()
    assert all(key in state for key in body.state_dict())
    assert not any(key.startswith(("stages.3", "final", "classifier")) for key in body.state_dict())
    assert body.stages[2] is model.stages[2]


@torch.no_grad()
@pytest.mark.parametrize("name", ["nf_resnet50", "nfnet_f0"])
def test_input_scale_gives_a_level_variance_one(name):
    torch.manual_seed(0)
    shape = {"widths": (256, 256, 64, 64), "depths": (4, 1, 1, 1), "skipinit_gain": 1.0, "stochdepth_rate": 0.0}
    overrides = {"use_se": False, "group_size": 32} if name == "nfnet_f0" else {}
    body = FeaturePyramidBackbone(create_model(name, **shape, **overrides), out_indices=(0,))
    (level,), (tensor,) = body.levels, body(torch.randn(8, 3, 96, 96)).values()
    gamma = {"nf_resnet50": 1.7139588594436646, "nfnet_f0": 1.7015043497085571}[name]
    assert level.input_scale == pytest.approx(gamma / math.sqrt(1 + 4 * 0.04))
    variance = (level.input_scale * tensor).var((0, 2, 3), correction=0).mean().item()
    # The branches lose 5 to 11 % of their 0.16 to padded cells, the stem some more; 256 random channels scatter.
    assert variance == pytest.approx(1, abs=0.12)


@pytest.mark.parametrize("name", FAMILIES)
def test_fcn_trains_at_batch_one(name):
    body = FeaturePyramidBackbone(small(name), out_indices=(2, 3), names=("aux", "out"))
    aux, out = (level.channels for level in body.levels)
    model = FCN(body, FCNHead(out, 4), FCNHead(aux, 4)).train()
    outputs = model(torch.randn(1, 3, 64, 80))
    assert outputs["out"].shape == outputs["aux"].shape == (1, 4, 64, 80)
    step(model, torch.cat(list(outputs.values())))


def test_deeplab_trains_at_batch_one_without_the_norm_of_its_pooled_branch():
    """That norm has one value a channel there, which is no statistic; torchvision's own models fail alike."""
    body = FeaturePyramidBackbone(small("nf_resnet50"), out_indices=(3,), names=("out",))
    model = FCN(body, DeepLabHead(body.levels[0].channels, 4)).train()
    x = torch.randn(1, 3, 64, 64)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        model(x)
    for module in model.modules():
        if isinstance(module, ASPPPooling):
            module[2] = nn.Identity()
    step(model, model(x)["out"])


def test_a_normalizer_free_head():
    body = FeaturePyramidBackbone(small("nf_regnet_b0"), out_indices=(3,), names=("out",))
    (level,) = body.levels
    head = ScaledWSConv2d(level.channels, 4, 3, input_scale=level.input_scale)
    model = FCN(body, head).train()
    x = torch.randn(3, 3, 64, 64)
    together, alone = model(x)["out"], torch.cat([model(example[None])["out"] for example in x])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    step(model, together)


@pytest.mark.parametrize("name", ["nf_resnet50", "nf_regnet_b0", "nfnet_f0", "resnetv2_50"])
def test_a_feature_pyramid_network_and_a_detector_train_at_batch_one(name):
    body = FeaturePyramidBackbone(small(name), out_indices=(1, 2, 3))
    fpn = FeaturePyramidNetwork([level.channels for level in body.levels], 16, extra_blocks=LastLevelP6P7(16, 16))
    backbone = nn.Sequential(OrderedDict(body=body, fpn=fpn))
    assert list(backbone(torch.randn(1, 3, 64, 64))) == ["0", "1", "2", "p6", "p7"]
    backbone.out_channels = 16
    model = RetinaNet(backbone, num_classes=3, min_size=64, max_size=96).train()
    target = {"boxes": torch.tensor([[4.0, 6.0, 40.0, 50.0]]), "labels": torch.tensor([1])}
    losses = model([torch.rand(3, 64, 80)], [target])
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert all(parameter.grad is not None for parameter in body.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"out_indices": (4,)}, r"^out_indices=\(4,\): must be ascending stage numbers from 0 to 3; pass"),
        ({"out_indices": (2, 1)}, "^out_indices=.*ascending"),
        ({"out_indices": ()}, "^out_indices=.*ascending"),
        ({"out_indices": 2}, "^out_indices=2: .*ascending"),
        ({"names": ("a", "b")}, "^names=.*one name per level.*; pass 4 names"),
        ({"names": ("a", "b", "c", "c")}, "^names=.*each its own"),
        ({"activated": 1}, "^activated=1: must be True or False"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        FeaturePyramidBackbone(small("nf_resnet50"), **arguments)


@pytest.mark.parametrize("name", ["type", "training", "a.b", "keys"])
def test_a_level_may_have_any_name(name):
    body = FeaturePyramidBackbone(small("resnetv2_50"), out_indices=(3,), names=(name,))
    assert list(body(torch.randn(2, 3, 64, 64))) == [name] == [level.name for level in body.levels]


def test_a_wrapped_model_is_found_in_its_wrapper():
    with pytest.raises(ValueError, match=r"^model='Sequential': .*; pass the one inside it, model\.0$"):
        FeaturePyramidBackbone(nn.Sequential(small("nf_resnet50")))


def test_another_model_is_refused():
    with pytest.raises(ValueError, match=r"^model='Linear': was not built by normfree.create_model; pass a model"):
        FeaturePyramidBackbone(nn.Linear(1, 1))
