"""Architectures for images and volumes: segmentation, medicine, detection, recognition, generation, video."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import nn

from benchmarks.foreign_case import Built, Case, count, load


def _smp(name: str, encoder: str, size: int) -> Built:
    import segmentation_models_pytorch as smp

    model = smp.create_model(name, encoder_name=encoder, encoder_weights=None, classes=3)
    return (model, torch.randn(4, 3, size, size))


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
    _smp_case("unet", "resnet18", blocks=_basic, counted="ResNet's BasicBlocks; the decoder concatenates"),
    _smp_case(
        "unet",
        "efficientnet-b0",
        blocks=lambda m: sum(block._has_drop_connect for block in m.modules() if type(block).__name__ == "MBConvBlock"),
        counted="MBConvBlocks of stride 1 and equal widths; the decoder concatenates",
    ),
    _smp_case(
        "unetplusplus", "resnet18", blocks=_basic, counted="ResNet's BasicBlocks; the nested decoder concatenates"
    ),
    _smp_case(
        "linknet",
        "resnet18",
        blocks=_basic,
        counted="ResNet's BasicBlocks; the decoder's additions of encoder maps are fusions",
        fusions=4,
    ),
    _smp_case(
        "fpn",
        "resnet18",
        blocks=_basic,
        counted="ResNet's BasicBlocks; lateral additions and the sum of the levels are fusions",
        fusions=6,
    ),
    _smp_case(
        "pspnet",
        "resnet18",
        blocks=lambda m: len(m.encoder.layer1) + len(m.encoder.layer2),
        counted="BasicBlocks of the two stages that PSPNet runs of ResNet",
    ),
    _smp_case("deeplabv3plus", "resnet18", blocks=_basic, counted="ResNet's BasicBlocks; the decoder concatenates"),
    _smp_case(
        "pan",
        "resnet18",
        blocks=_basic,
        counted="ResNet's BasicBlocks; additions of pyramid levels and attended maps are fusions",
        size=128,
        fusions=8,
    ),
    _smp_case(
        "manet",
        "resnet18",
        blocks=lambda m: _basic(m) + 1,
        counted="ResNet's BasicBlocks, and the position attention in the middle",
    ),
    _smp_case(
        "segformer",
        "mit_b0",
        blocks=lambda m: 2 * count(m, "Block"),
        counted="attention and MLP of each Mix-Transformer block",
    ),
    _smp_case(
        "upernet",
        "resnet18",
        blocks=_basic,
        counted="ResNet's BasicBlocks; lateral additions of the pyramid are fusions",
        fusions=3,
    ),
]


def _monai(name: str, *arguments: Any, shape: tuple[int, ...] = (2, 1, 32, 32, 32), **options: Any) -> Built:
    from monai.networks import nets

    return (getattr(nets, name)(*arguments, **options), torch.randn(shape))


def _medical(name: str, build: Any, blocks: Any, counted: str, because: str, fusions: int = 0) -> Case:
    return Case(
        name=f"monai:{name}",
        package="monai",
        field="medical volumes",
        build=build,
        blocks=blocks,
        counted=counted,
        verdict="healthy",
        because=because,
        fusions=fusions,
    )


MONAI = [
    _medical(
        "SegResNet",
        build=lambda: _monai("SegResNet", init_filters=8, in_channels=1, out_channels=2),
        blocks=lambda m: count(m, "ResBlock"),
        counted="ResBlocks; each decoder level adds the encoder's map (a fusion)",
        because="GroupNorm before each convolution",
        fusions=3,
    ),
    _medical(
        "UNet",
        build=lambda: _monai("UNet", 3, 1, 2, (8, 16, 32, 64), (2, 2, 2), num_res_units=2),
        blocks=lambda m: count(m, "ResidualUnit"),
        counted="ResidualUnits; levels are concatenated",
        because="InstanceNorm after each convolution",
    ),
    _medical(
        "DynUNet",
        build=lambda: _monai("DynUNet", 3, 1, 2, [3, 3, 3], [1, 2, 2], [2, 2], filters=[8, 16, 32], res_block=True),
        blocks=lambda m: count(m, "UnetResBlock"),
        counted="UnetResBlocks",
        because="InstanceNorm after each convolution",
    ),
    _medical(
        "BasicUNet",
        build=lambda: _monai("BasicUNet", 3, 1, 2, features=(8, 8, 16, 32, 64, 8)),
        blocks=0,
        counted="levels are concatenated, blocks are plain",
        because="InstanceNorm after each convolution",
    ),
    _medical(
        "AttentionUnet",
        build=lambda: _monai("AttentionUnet", 3, 1, 2, (8, 16, 32), (2, 2)),
        blocks=0,
        counted="levels are concatenated; additive attention sums two gates, which is no shortcut",
        because="BatchNorm after each convolution",
    ),
    _medical(
        "VNet",
        build=lambda: _monai("VNet", in_channels=1, out_channels=2),
        blocks=lambda m: count(m, "InputTransition", "DownTransition", "UpTransition"),
        counted="each transition adds its input",
        because="BatchNorm after each convolution",
    ),
    _medical(
        "SwinUNETR",
        build=lambda: _monai(
            "SwinUNETR", in_channels=1, out_channels=2, feature_size=12, spatial_dims=2, shape=(2, 1, 64, 64)
        ),
        blocks=lambda m: 2 * count(m, "SwinTransformerBlock") + count(m, "UnetResBlock"),
        counted="attention and MLP of each Swin block; UnetResBlocks",
        because="LayerNorm and InstanceNorm",
    ),
    _medical(
        "UNETR",
        build=lambda: _monai(
            "UNETR",
            in_channels=1,
            out_channels=2,
            img_size=(32, 32, 32),
            feature_size=8,
            hidden_size=48,
            mlp_dim=96,
            num_heads=4,
        ),
        blocks=lambda m: 2 * count(m, "TransformerBlock") + count(m, "UnetResBlock"),
        counted="attention and MLP of each block; UnetResBlocks",
        because="LayerNorm and InstanceNorm",
    ),
    _medical(
        "DenseNet121",
        build=lambda: _monai("DenseNet121", spatial_dims=3, in_channels=1, out_channels=2, shape=(8, 1, 32, 32, 32)),
        blocks=0,
        counted="DenseNet concatenates",
        because="BatchNorm before each convolution, over eight values at the end",
    ),
    _medical(
        "resnet10",
        build=lambda: _monai("resnet10", spatial_dims=3, n_input_channels=1, num_classes=2),
        blocks=lambda m: count(m, "ResNetBlock"),
        counted="ResNetBlocks",
        because="BatchNorm after each convolution",
    ),
    _medical(
        "SEResNet50",
        build=lambda: _monai("SEResNet50", spatial_dims=2, in_channels=3, num_classes=2, shape=(4, 3, 64, 64)),
        blocks=lambda m: count(m, "SEResNetBottleneck"),
        counted="SEResNetBottlenecks",
        because="BatchNorm after each convolution",
    ),
]


def _nnunet(residual: bool) -> Built:
    unet = load(
        "dynamic_network_architectures.architectures.unet", "ResidualEncoderUNet" if residual else "PlainConvUNet"
    )
    blocks = {"n_blocks_per_stage": [1, 2, 2, 2]} if residual else {"n_conv_per_stage": 2}
    model = unet(
        1,
        4,
        (8, 16, 32, 64),
        nn.Conv3d,
        3,
        (1, 2, 2, 2),
        num_classes=2,
        n_conv_per_stage_decoder=1 if residual else 2,
        conv_bias=True,
        norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        **blocks,
    )
    return (model, torch.randn(2, 1, 32, 32, 32))


NNUNET = [
    Case(
        name="nnunet:PlainConvUNet",
        package="dynamic-network-architectures",
        field="medical volumes",
        build=lambda: _nnunet(False),
        blocks=0,
        counted="levels are concatenated, blocks are plain",
        because="InstanceNorm after each convolution",
    ),
    Case(
        name="nnunet:ResidualEncoderUNet",
        package="dynamic-network-architectures",
        field="medical volumes",
        build=lambda: _nnunet(True),
        blocks=lambda m: count(m, "BasicBlockD", "BottleneckD"),
        counted="residual blocks of the encoder",
        because="InstanceNorm after each convolution",
    ),
]


def _yolo(file: str, size: int = 64, **options: Any) -> Built:
    tasks = import_module("ultralytics.nn.tasks")
    kind = {"cls": "ClassificationModel", "seg": "SegmentationModel", "pose": "PoseModel"}.get(
        file.partition(".")[0].partition("-")[2], "DetectionModel"
    )
    return (getattr(tasks, kind)(file, verbose=False), torch.randn(4, 3, size, size))


def _yolo_blocks(model: Any) -> int:
    bottlenecks = sum(bool(m.add) for m in model.modules() if type(m).__name__ in ("Bottleneck", "CIB"))
    attention = sum(2 * getattr(m, "add", True) for m in model.modules() if type(m).__name__ in ("PSABlock", "PSA"))
    return bottlenecks + attention


YOLO = [
    Case(
        name=f"ultralytics:{file}",
        package="ultralytics",
        field=field,
        build=lambda file=file: _yolo(f"{file}.yaml"),
        blocks=_yolo_blocks,
        counted="bottlenecks that add, and two of each attention block; levels are concatenated",
        because="BatchNorm after each convolution",
    )
    for file, field in (
        ("yolov8n", "detection"),
        ("yolo11n", "detection"),
        ("yolov5n", "detection"),
        ("yolov8n-seg", "segmentation"),
        ("yolo11n-cls", "recognition"),
        ("yolov10n", "detection"),
    )
]


def _open_clip(layers: Any) -> Built:
    model = load("open_clip", "CLIP")(
        embed_dim=32,
        vision_cfg={
            "layers": layers,
            "width": 16 if isinstance(layers, list) else 64,
            "image_size": 64,
            "patch_size": 16,
            "head_width": 16,
        },
        text_cfg={"context_length": 12, "vocab_size": 64, "width": 64, "heads": 4, "layers": 3},
    )
    return (model, {"image": torch.randn(4, 3, 64, 64), "text": torch.randint(1, 64, (4, 12))})


def _coca() -> Built:
    text = {
        "context_length": 12,
        "vocab_size": 64,
        "width": 64,
        "heads": 4,
        "layers": 2,
        "embed_cls": True,
        "output_tokens": True,
    }
    decoder = {"context_length": 12, "vocab_size": 64, "width": 64, "heads": 4, "layers": 2}
    vision = {
        "layers": 3,
        "width": 64,
        "image_size": 64,
        "patch_size": 16,
        "head_width": 16,
        "attentional_pool": True,
        "attn_pooler_heads": 4,
        "output_tokens": True,
    }
    model = load("open_clip", "CoCa")(64, decoder, text, vision)
    nn.init.normal_(model.text_decoder.text_projection, std=64**-0.5)  # which its constructor leaves unset
    return model, {"image": torch.randn(4, 3, 64, 64), "text": torch.randint(1, 64, (4, 12))}


def _fastai_unet() -> Built:
    body = load("fastai.vision.models.xresnet", "xresnet18")(n_out=10)
    encoder = nn.Sequential(*list(body.children())[:-3])
    return (load("fastai.vision.models.unet", "DynamicUnet")(encoder, 3, (64, 64)), torch.randn(4, 3, 64, 64))


IMAGES = [
    Case(
        name="fastai:xresnet18",
        package="fastai",
        field="recognition",
        build=lambda: (load("fastai.vision.models.xresnet", "xresnet18")(n_out=10), torch.randn(4, 3, 64, 64)),
        blocks=lambda m: count(m, "ResBlock"),
        counted="ResBlocks",
        because="BatchNorm after each convolution",
    ),
    Case(
        name="fastai:xse_resnext18",
        package="fastai",
        field="recognition",
        build=lambda: (load("fastai.vision.models.xresnet", "xse_resnext18")(n_out=10), torch.randn(4, 3, 64, 64)),
        blocks=lambda m: count(m, "ResBlock"),
        counted="ResBlocks",
        because="BatchNorm after each convolution",
    ),
    Case(
        name="fastai:DynamicUnet",
        package="fastai",
        field="segmentation",
        build=_fastai_unet,
        blocks=lambda m: count(m, "ResBlock"),
        counted="ResBlocks of the encoder and of the last layer; levels are concatenated",
        because="BatchNorm in the encoder, weights initialised for ReLU in the decoder",
    ),
    Case(
        name="efficientnet-pytorch:b0",
        package="efficientnet-pytorch",
        field="recognition",
        build=lambda: (
            load("efficientnet_pytorch", "EfficientNet").from_name("efficientnet-b0", num_classes=10),
            torch.randn(4, 3, 64, 64),
        ),
        blocks=lambda m: sum(
            b.id_skip
            and b._block_args.stride in (1, [1])
            and (b._block_args.input_filters == b._block_args.output_filters)
            for b in m._blocks
        ),
        counted="MBConv blocks of stride 1 and equal widths",
        because="BatchNorm after each convolution",
    ),
    Case(
        name="open-clip:RN50",
        package="open-clip-torch",
        field="vision and language",
        build=lambda: _open_clip([2, 2, 2, 2]),
        blocks=lambda m: count(m.visual, "Bottleneck") + 2 * count(m, "ResidualAttentionBlock"),
        counted="bottlenecks of the vision tower, two of each text block",
        because="BatchNorm and LayerNorm",
    ),
    Case(
        name="open-clip:ViT",
        package="open-clip-torch",
        field="vision and language",
        build=lambda: _open_clip(3),
        blocks=lambda m: 2 * count(m, "ResidualAttentionBlock"),
        counted="attention and MLP of each block of both towers",
        because="LayerNorm before each branch",
    ),
    Case(
        name="open-clip:CoCa",
        package="open-clip-torch",
        field="vision and language",
        build=lambda: _coca(),
        blocks=lambda m: 2 * count(m, "ResidualAttentionBlock"),
        counted="attention and MLP of each block",
        because="LayerNorm before each branch",
    ),
    Case(
        name="vit-pytorch:ViT",
        package="vit-pytorch",
        field="recognition",
        build=lambda: (
            load("vit_pytorch", "ViT")(
                image_size=64, patch_size=16, num_classes=10, dim=64, depth=4, heads=4, mlp_dim=128
            ),
            torch.randn(4, 3, 64, 64),
        ),
        blocks=8,
        counted="attention and MLP of each of four layers",
        because="LayerNorm before each branch",
    ),
    Case(
        name="vit-pytorch:MobileViT",
        package="vit-pytorch",
        field="recognition",
        build=lambda: (
            load("vit_pytorch.mobile_vit", "MobileViT")(
                image_size=(64, 64),
                dims=[32, 48, 64],
                channels=[16, 16, 24, 24, 32, 32, 48, 48, 64, 64, 128],
                num_classes=10,
            ),
            torch.randn(4, 3, 64, 64),
        ),
        blocks=lambda m: (
            sum(b.use_res_connect for b in m.modules() if type(b).__name__ == "MV2Block") + 2 * (2 + 4 + 3)
        ),
        counted="inverted residuals that add, and two of each transformer layer",
        because="BatchNorm and LayerNorm",
    ),
    Case(
        name="vit-pytorch:CCT",
        package="vit-pytorch",
        field="recognition",
        build=lambda: (
            load("vit_pytorch.cct", "CCT")(
                img_size=64, embedding_dim=64, n_conv_layers=2, num_layers=4, num_heads=4, mlp_ratio=2.0, num_classes=10
            ),
            torch.randn(4, 3, 64, 64),
        ),
        blocks=8,
        counted="attention and MLP of each of four layers",
        because="LayerNorm before each branch",
    ),
    Case(
        name="vit-pytorch:CvT",
        package="vit-pytorch",
        field="recognition",
        build=lambda: (
            load("vit_pytorch.cvt", "CvT")(
                num_classes=10,
                s1_emb_dim=16,
                s2_emb_dim=32,
                s3_emb_dim=64,
                s3_depth=3,
                s1_heads=1,
                s2_heads=2,
                s3_heads=2,
            ),
            torch.randn(4, 3, 64, 64),
        ),
        blocks=2 * (1 + 2 + 3),
        counted="attention and MLP of each layer",
        because="LayerNorm before each branch",
    ),
    Case(
        name="vit-pytorch:SimpleViT-1d",
        package="vit-pytorch",
        field="time series",
        build=lambda: (
            load("vit_pytorch.simple_vit_1d", "SimpleViT")(
                seq_len=64, patch_size=8, num_classes=10, dim=64, depth=3, heads=4, mlp_dim=128
            ),
            torch.randn(4, 3, 64),
        ),
        blocks=6,
        counted="attention and MLP of each of three layers",
        because="LayerNorm before each branch",
    ),
    Case(
        name="kornia:HardNet",
        package="kornia",
        field="local features",
        build=lambda: (load("kornia.feature", "HardNet")(pretrained=False), torch.randn(16, 1, 32, 32)),
        blocks=0,
        counted="a chain of seven convolutions",
        because="BatchNorm after each convolution",
    ),
    Case(
        name="kornia:DexiNed",
        package="kornia",
        field="edges",
        build=lambda: (load("kornia.filters.dexined", "DexiNed")(pretrained=False), torch.randn(2, 3, 64, 64)),
        blocks=lambda m: 2 + 3 + 3 + 3,
        counted="each dense layer is averaged with the block's side input; side outputs between the blocks are fusions",
        because="BatchNorm after each convolution",
        fusions=4,
    ),
    Case(
        name="kornia:TinyViT",
        package="kornia",
        field="recognition",
        build=lambda: (
            load("kornia.contrib", "TinyViT")(
                img_size=64,
                num_classes=10,
                embed_dims=(32, 32, 64, 64),
                depths=(1, 1, 2, 1),
                num_heads=(1, 2, 2, 2),
                window_sizes=(4, 4, 4, 2),
            ),
            torch.randn(4, 3, 64, 64),
        ),
        blocks=lambda m: count(m, "MBConv") + 2 * count(m, "TinyViTBlock"),
        counted="MBConvs; attention and MLP of each block",
        because="BatchNorm and LayerNorm",
    ),
]


GENERATION = [
    Case(
        name="denoising-diffusion:Unet",
        package="denoising-diffusion-pytorch",
        field="generation",
        build=lambda: (
            load("denoising_diffusion_pytorch", "Unet")(dim=16, dim_mults=(1, 2, 4), flash_attn=False),
            (torch.randn(4, 3, 32, 32), torch.randint(0, 100, (4,))),
        ),
        blocks=lambda m: count(m, "ResnetBlock", "LinearAttention", "Attention"),
        counted="ResnetBlocks and attentions",
        because="RMSNorm after each convolution",
    ),
    Case(
        name="spandrel:ESRGAN",
        package="spandrel",
        field="restoration",
        build=lambda: (
            load("spandrel.architectures.ESRGAN.__arch.RRDB", "RRDBNet")(num_filters=16, num_blocks=3),
            torch.randn(2, 3, 24, 24),
        ),
        blocks=lambda m: 4 * 3 + 1,
        counted="three dense blocks and one addition around them in each of three, and one around all",
        because="no normalizer: branches are scaled by 0.2",
    ),
]


VIDEO = [
    Case(
        name="pytorchvideo:slowfast_r50",
        package="pytorchvideo",
        field="video",
        build=lambda: (
            load("pytorchvideo.models", "create_slowfast")(
                model_num_class=10,
                head_pool_kernel_sizes=((4, 2, 2), (16, 2, 2)),
                slowfast_fusion_conv_stride=(4, 1, 1),
            ),
            ([torch.randn(1, 3, 4, 64, 64), torch.randn(1, 3, 16, 64, 64)],),
        ),
        blocks=lambda m: count(m, "ResBlock"),
        counted="bottlenecks of both pathways, which are joined by concatenation",
        because="BatchNorm after each convolution",
    ),
    Case(
        name="pytorchvideo:x3d",
        package="pytorchvideo",
        field="video",
        build=lambda: (
            load("pytorchvideo.models.x3d", "create_x3d")(input_clip_length=4, input_crop_size=64, model_num_class=10),
            torch.randn(2, 3, 4, 64, 64),
        ),
        blocks=lambda m: count(m, "ResBlock"),
        counted="bottlenecks",
        because="BatchNorm after each convolution",
    ),
    Case(
        name="pytorchvideo:slow_r50",
        package="pytorchvideo",
        field="video",
        build=lambda: (
            load("pytorchvideo.models", "create_resnet")(model_num_class=10, head_pool_kernel_size=(4, 2, 2)),
            torch.randn(2, 3, 4, 64, 64),
        ),
        blocks=lambda m: count(m, "ResBlock"),
        counted="bottlenecks",
        because="BatchNorm after each convolution",
    ),
]


CASES = [*SMP, *MONAI, *NNUNET, *YOLO, *IMAGES, *GENERATION, *VIDEO]
