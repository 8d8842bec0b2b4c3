"""Architectures for images and volumes: segmentation, medicine, detection, recognition, restoration."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.foreign_case import Built, Case, count

def _smp(name: str, encoder: str, size: int) -> Built:
    import segmentation_models_pytorch as smp

    model = smp.create_model(name, encoder_name=encoder, encoder_weights=None, classes=3)
    return model, torch.randn(4, 3, size, size)


def _smp_case(name: str, encoder: str, blocks: Any, counted: str, size: int = 64, fusions: int = 0) -> Case:
    return Case(
        name=f"smp:{name}-{encoder}",
        package="segmentation-models-pytorch",
        field="segmentation",
        build=lambda: _smp(name, encoder, size),
        blocks=blocks,
        counted=counted,
        verdict="healthy",
        because="every convolution but the last is followed by BatchNorm",
        fusions=fusions,
    )


def _basic(model: Any) -> int:
    return count(model, "BasicBlock", "Bottleneck")


SMP = [
    _smp_case("unet", "resnet18", _basic, "ResNet's BasicBlocks; the decoder concatenates"),
    _smp_case(
        "unet",
        "efficientnet-b0",
        lambda m: sum(block._has_drop_connect for block in m.modules() if type(block).__name__ == "MBConvBlock"),
        "MBConvBlocks of stride 1 and equal widths; the decoder concatenates",
    ),
    _smp_case("unetplusplus", "resnet18", _basic, "ResNet's BasicBlocks; the nested decoder concatenates"),
    _smp_case("linknet", "resnet18", _basic, "ResNet's BasicBlocks; the decoder's additions of encoder maps are fusions", fusions=4),
    _smp_case("fpn", "resnet18", _basic, "ResNet's BasicBlocks; lateral additions and the sum of the levels are fusions", fusions=6),
    _smp_case("pspnet", "resnet18", lambda m: len(m.encoder.layer1) + len(m.encoder.layer2), "BasicBlocks of the two stages that PSPNet runs of ResNet"),
    _smp_case("deeplabv3plus", "resnet18", _basic, "ResNet's BasicBlocks; the decoder concatenates"),
    _smp_case("pan", "resnet18", _basic, "ResNet's BasicBlocks; additions of pyramid levels and attended maps are fusions", size=128, fusions=8),
    _smp_case("manet", "resnet18", lambda m: _basic(m) + 1, "ResNet's BasicBlocks, and the position attention in the middle"),
    _smp_case("segformer", "mit_b0", lambda m: 2 * count(m, "Block"), "attention and MLP of each Mix-Transformer block"),
    _smp_case("upernet", "resnet18", _basic, "ResNet's BasicBlocks; lateral additions of the pyramid are fusions", fusions=3),
]


def _monai(name: str, *arguments: Any, shape: tuple[int, ...] = (2, 1, 32, 32, 32), **options: Any) -> Built:
    from monai.networks import nets

    return getattr(nets, name)(*arguments, **options), torch.randn(shape)


def _medical(name: str, build: Any, blocks: Any, counted: str, because: str, fusions: int = 0) -> Case:
    return Case(name=f"monai:{name}", package="monai", field="medical volumes", build=build, blocks=blocks, counted=counted, verdict="healthy", because=because, fusions=fusions)


MONAI = [
    _medical("SegResNet", lambda: _monai("SegResNet", init_filters=8, in_channels=1, out_channels=2), lambda m: count(m, "ResBlock"), "ResBlocks; each decoder level adds the encoder's map (a fusion)", "GroupNorm before each convolution", fusions=3),
    _medical("UNet", lambda: _monai("UNet", 3, 1, 2, (8, 16, 32, 64), (2, 2, 2), num_res_units=2), lambda m: count(m, "ResidualUnit"), "ResidualUnits; levels are concatenated", "InstanceNorm after each convolution"),
    _medical("DynUNet", lambda: _monai("DynUNet", 3, 1, 2, [3, 3, 3], [1, 2, 2], [2, 2], filters=[8, 16, 32], res_block=True), lambda m: count(m, "UnetResBlock"), "UnetResBlocks", "InstanceNorm after each convolution"),
    _medical("BasicUNet", lambda: _monai("BasicUNet", 3, 1, 2, features=(8, 8, 16, 32, 64, 8)), 0, "levels are concatenated, blocks are plain", "InstanceNorm after each convolution"),
    _medical("AttentionUnet", lambda: _monai("AttentionUnet", 3, 1, 2, (8, 16, 32), (2, 2)), 0, "levels are concatenated; additive attention sums two gates, which is no shortcut", "BatchNorm after each convolution"),
    _medical("VNet", lambda: _monai("VNet", in_channels=1, out_channels=2), lambda m: count(m, "InputTransition", "DownTransition", "UpTransition"), "each transition adds its input", "BatchNorm after each convolution"),
    _medical("SwinUNETR", lambda: _monai("SwinUNETR", in_channels=1, out_channels=2, feature_size=12, spatial_dims=2, shape=(2, 1, 64, 64)), lambda m: 2 * count(m, "SwinTransformerBlock") + count(m, "UnetResBlock"), "attention and MLP of each Swin block; UnetResBlocks", "LayerNorm and InstanceNorm"),
    _medical("UNETR", lambda: _monai("UNETR", in_channels=1, out_channels=2, img_size=(32, 32, 32), feature_size=8, hidden_size=48, mlp_dim=96, num_heads=4), lambda m: 2 * count(m, "TransformerBlock") + count(m, "UnetResBlock"), "attention and MLP of each block; UnetResBlocks", "LayerNorm and InstanceNorm"),
    _medical("DenseNet121", lambda: _monai("DenseNet121", spatial_dims=3, in_channels=1, out_channels=2), 0, "DenseNet concatenates", "BatchNorm before each convolution"),
    _medical("resnet10", lambda: _monai("resnet10", spatial_dims=3, n_input_channels=1, num_classes=2), lambda m: count(m, "ResNetBlock"), "ResNetBlocks", "BatchNorm after each convolution"),
    _medical("SEResNet50", lambda: _monai("SEResNet50", spatial_dims=2, in_channels=3, num_classes=2, shape=(4, 3, 64, 64)), lambda m: count(m, "SEResNetBottleneck"), "SEResNetBottlenecks", "BatchNorm after each convolution"),
]


CASES = [*SMP, *MONAI]
