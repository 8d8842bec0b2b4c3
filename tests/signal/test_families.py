"""One architecture per family: the residual additions found are those its authors state, at their places."""

import pytest
import torch
import torchvision
from torchvision.models.video import mvit

from normfree.signal import spp

IMAGE, FRAMES = (3, 64, 64), (3, 4, 32, 32)


def _torchvision(name, **options):
    if name.startswith(("fcn", "deeplab", "lraspp")):
        options["weights_backbone"] = None
    return torchvision.models.get_model(name, weights=None, **options)


def _timm(name, **options):
    timm = pytest.importorskip("timm", reason="timm is not installed: pip install 'normfree[timm]'")
    return timm.create_model(name, **options)


def _swin(**options):
    return torchvision.models.SwinTransformer([4, 4], 32, [2, 2], [2, 4], [4, 4], num_classes=10, **options)


def _maxvit(**options):
    return torchvision.models.MaxVit(
        input_size=(64, 64),
        stem_channels=8,
        partition_size=2,
        block_channels=[8, 16],
        block_layers=[1, 2],
        head_dim=8,
        stochastic_depth_prob=0.0,
        **options,
    )


def _mvit(**options):
    """Multiscale ViT v1 of 4 blocks; queries and shortcut are pooled at the third, but for the class token."""
    blocks = [
        mvit.MSBlockConfig(1, 16, 16, [], [1, 4, 4], [], [1, 1, 1]),
        mvit.MSBlockConfig(1, 16, 32, [3, 3, 3], [3, 3, 3], [1, 1, 1], [1, 4, 4]),
        mvit.MSBlockConfig(2, 32, 32, [3, 3, 3], [3, 3, 3], [1, 2, 2], [1, 2, 2]),
        mvit.MSBlockConfig(2, 32, 32, [], [3, 3, 3], [], [1, 2, 2]),
    ]
    return mvit.MViT((32, 32), 4, blocks, False, False, False, False, **options)


# name: (builder, options, shape of one example, residual additions, (axis, dimensions) of the channels,
#        entry, first point, last point)
FAMILIES = {
    # 2 + 2 + 2 + 2 basic blocks
    "resnet18": (_torchvision, {}, IMAGE, 8, {(1, 4)}, "layer1.0", "layer1.0", "layer4.1"),
    # depths 1, 3, 6, 6; the first block of every stage projects
    "regnet_y_400mf": (
        *(_torchvision, {}, IMAGE, 16, {(1, 4)}, "trunk_output.block1.block1-0"),
        *("trunk_output.block1.block1-0", "trunk_output.block4.block4-5"),
    ),
    # 16 MBConv blocks in 7 stages, the first of each without shortcut
    "efficientnet_b0": (_torchvision, {}, IMAGE, 9, {(1, 4)}, "features.2.1", "features.2.1", "features.6.3"),
    # 17 inverted residuals, 7 of them change width or size
    "mobilenet_v2": (_torchvision, {}, IMAGE, 10, {(1, 4)}, "features.3", "features.3", "features.16"),
    # 12 layers of attention and MLP
    "vit_b_32": (
        *(_torchvision, {"image_size": 64}, IMAGE, 24, {(2, 3)}, "encoder.layers.encoder_layer_0"),
        *("encoder.layers.encoder_layer_0", "encoder.layers.encoder_layer_11#2"),
    ),
    # depths 3, 3, 9, 3
    "convnext_tiny": (_torchvision, {}, IMAGE, 18, {(1, 4)}, "features.1.0", "features.1.0", "features.7.2"),
    # 2 + 2 layers of attention and MLP, [N, H, W, C]
    "swin": (_swin, {}, IMAGE, 8, {(3, 4)}, "features.1.0", "features.1.0", "features.3.1#2"),
    # 1 + 2 blocks, each an MBConv and attention and MLP over windows and over the grid
    "maxvit": (
        *(_maxvit, {}, IMAGE, 15, {(1, 4), (3, 4)}, "blocks.0.layers.0.layers.MBconv"),
        *("blocks.0.layers.0.layers.MBconv", "blocks.1.layers.1.layers.grid_attention#2"),
    ),
    # stages 1; 2×2; 3×2; 4×2 blocks per branch, then 4 widening blocks; the fusions are not residual
    "hrnet_w18_small": (_timm, {}, IMAGE, 23, {(1, 4)}, "layer1.0", "layer1.0", "incre_modules.3.0"),
    # 3 + 4 + 6 + 3 blocks; the hierarchy of 4 scales inside each is not residual
    "res2net50_26w_4s": (_timm, {}, IMAGE, 16, {(1, 4)}, "layer1.0", "layer1.0", "layer4.2"),
    # 8 layers of token and channel mixing
    "mixer_s32_224": (_timm, {"img_size": 64}, IMAGE, 16, {(2, 3)}, "blocks.0", "blocks.0", "blocks.7#2"),
    # depths 1, 2, 6, 3
    "dm_nfnet_f0": (_timm, {}, IMAGE, 12, {(1, 4)}, "stages.0.0", "stages.0.0", "stages.3.2"),
    # depths 3, 3, 5, 2, on half of the channels
    "cspresnet50": (_timm, {}, IMAGE, 13, {(1, 4)}, "stages.0.blocks.0", "stages.0.blocks.0", "stages.3.blocks.1"),
    # 2 + 3 convolution blocks, then 5 + 2 of attention and MLP
    "coatnet_pico_rw_224": (
        *(_timm, {"img_size": 64}, IMAGE, 19, {(1, 4)}, "stages.0.blocks.0"),
        *("stages.0.blocks.0", "stages.3.blocks.1#2"),
    ),
    # depths 2, 2, 6, 2 of pooling and MLP: the pooling branch has no weights but its norm's
    "poolformer_s12": (_timm, {}, IMAGE, 24, {(1, 4)}, "stages.0.blocks.0", "stages.0.blocks.0", "stages.3.blocks.1#2"),
    # parallel ViT: 3 blocks of one addition, attention and MLP summed in the branch
    "vit_dpwee_patch16_reg1_gap_256": (
        *(_timm, {"depth": 3, "img_size": 64}, IMAGE, 3, {(2, 3)}, "blocks.0"),
        *("blocks.0", "blocks.2"),
    ),
    # parallel ViT of two attentions, then two MLPs: 2 additions a block
    "vit_small_patch16_18x2_224": (
        *(_timm, {"depth": 3, "img_size": 64}, IMAGE, 6, {(2, 3)}, "blocks.0"),
        *("blocks.0", "blocks.2#2"),
    ),
    # dual path: 3 + 4 + 12 + 3 blocks, part of the channels added, the rest concatenated
    "dpn68": (_timm, {}, IMAGE, 22, {(1, 4)}, "features.conv2_1", "features.conv2_1", "features.conv5_3"),
    # 4 layers of 2; 2 class-attention layers of 2, but the very first shortcut is the class token, a parameter
    "cait_xxs24_224": (
        *(_timm, {"depth": 4, "img_size": 64}, IMAGE, 11, {(2, 3)}, "blocks.0"),
        *("blocks.0", "blocks_token_only.1#2"),
    ),
    # 4 outlook layers, 4 + 8 + 2 transformer layers and 2 of class attention, 2 each
    "volo_d1_224": (
        *(_timm, {"img_size": 64}, IMAGE, 40, {(3, 4), (2, 3)}, "network.0.0"),
        *("network.0.0", "post_network.1#2"),
    ),
    # segmentation: the backbone's 3 + 4 + 6 + 3 bottlenecks; a dict of outputs
    "fcn_resnet50": (
        _torchvision,
        {},
        IMAGE,
        16,
        {(1, 4)},
        "backbone.layer1.0",
        "backbone.layer1.0",
        "backbone.layer4.2",
    ),
    # the 15 blocks of MobileNetV3-Large, 10 of them with shortcut
    "deeplabv3_mobilenet_v3_large": (
        *(_torchvision, {}, IMAGE, 10, {(1, 4)}, "backbone.1"),
        *("backbone.1", "backbone.15"),
    ),
    # the same, and one long skip: low-level classifier + high-level classifier
    "lraspp_mobilenet_v3_large": (_torchvision, {}, IMAGE, 11, {(1, 4)}, "backbone.1", "backbone.1", "classifier"),
    # video
    "r3d_18": (_torchvision, {}, FRAMES, 8, {(1, 5)}, "layer1.0", "layer1.0", "layer4.1"),
    # 4 blocks of attention and MLP
    "mvit": (_mvit, {}, FRAMES, 8, {(2, 3)}, "blocks.0", "blocks.0", "blocks.3#2"),
    # 2 + 2 + 6 + 2 layers of attention and MLP, [N, T, H, W, C]
    "swin3d_t": (_torchvision, {}, FRAMES, 24, {(4, 5)}, "features.0.0", "features.0.0", "features.6.1#2"),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_additions_are_those_the_authors_state(name):
    build, options, shape, count, axes, entry, first, last = FAMILIES[name]
    torch.manual_seed(0)
    model = build(name, **options) if build in (_torchvision, _timm) else build(**options)
    signal = spp(model, torch.randn(2, *shape))
    assert {block.kind for block in signal.blocks} == {"residual"}
    assert len(signal.blocks) == count
    assert {(block.channel_axis, len(block.shape)) for block in signal.blocks} == axes
    assert (signal.entry.name, signal.blocks[0].name, signal.blocks[-1].name) == (entry, first, last)


TRANSITIONS = {"resnet18": 3, "regnet_y_400mf": 4, "efficientnet_b0": 0, "r3d_18": 3}
"""ResNet-18's first stage keeps its width; the others' first blocks all project, or have no shortcut at all."""


@pytest.mark.parametrize("name", TRANSITIONS)
def test_transitions_are_the_projected_shortcuts(name):
    build, options, shape, *_ = FAMILIES[name]
    signal = spp(build(name, **options), torch.randn(2, *shape))
    assert sum(block.transition for block in signal.blocks) == TRANSITIONS[name]


# 116 + 3 + 1 convolutions and the classifier; 8 convolutions and 3 linear layers
@pytest.mark.parametrize(("name", "layers"), [("densenet121", 121), ("vgg11", 11)])
def test_networks_without_additions_get_a_point_per_layer(name, layers):
    signal = spp(_torchvision(name), torch.randn(2, 3, 32, 32))
    assert {block.kind for block in signal.blocks} == {"layer"}
    assert len(signal.blocks) == layers
    assert {(block.channel_axis, len(block.shape)) for block in signal.blocks} == {(1, 4), (1, 2)}
    assert signal.entry.shape == (2, 3, 32, 32)
