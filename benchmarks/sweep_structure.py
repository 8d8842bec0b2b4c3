"""How many residual additions the authors' code makes, counted from the modules and not from the dataflow.

The counts were read off each block's ``forward``: one for a shortcut, two for a transformer layer (attention
and MLP). They are the reference the recorder is held against, so nothing here looks at a tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

Count = int | Callable[[Any], int]

UNSTATED = ("nasnet", "pnasnet")
"""Searched cells add pairs of operations; which of them are shortcuts, their authors do not say."""


def _by_attribute(name: str) -> Callable[[Any], int]:
    """One if the block was built with its shortcut: an attribute that is true, or a module instead of None."""
    return lambda module: int(getattr(module, name) is not None and getattr(module, name) is not False)


def _names(module: str, names: str, count: Count) -> dict[str, Count]:
    return {f"{module}.{name}": count for name in names.split()}


def _fastvit_mobile_one(m: Any) -> int:
    """``identity + scale`` and then one more addition per convolution; without identity all are parallel."""
    return 0 if m.identity is None else (m.conv_scale is not None) + len(m.conv_kxk or ())


TORCHVISION: dict[str, Count] = {
    **_names("resnet", "BasicBlock Bottleneck", 1),  # also the video ResNets' and timm's
    "regnet.ResBottleneckBlock": 1,
    **_names("efficientnet", "MBConv FusedMBConv", _by_attribute("use_res_connect")),
    "mobilenetv2.InvertedResidual": _by_attribute("use_res_connect"),
    "mobilenetv3.InvertedResidual": _by_attribute("use_res_connect"),
    "mnasnet._InvertedResidual": _by_attribute("apply_residual"),
    "convnext.CNBlock": 1,
    "vision_transformer.EncoderBlock": 2,
    **_names("swin_transformer", "SwinTransformerBlock", 2),  # video Swin's and timm's too
    "maxvit.MBConv": 1,
    "maxvit.PartitionAttentionLayer": 2,
    "mvit.MultiscaleBlock": 2,
    "feature_pyramid_network.FeaturePyramidNetwork": lambda m: len(m.inner_blocks) - 1,  # lateral + top-down
    "lraspp.LRASPPHead": 1,  # low-level classifier + high-level classifier
    **_names("raft", "ResidualBlock BottleneckBlock", 1),
    "raft.RAFT": 11,  # 12 updates flow + Δflow; before the first the flow is constant
}

TIMM: dict[str, Count] = {
    **_names(
        "_efficientnet_blocks",
        "ConvBnAct DepthwiseSeparableConv InvertedResidual UniversalInvertedResidual EdgeResidual",
        _by_attribute("has_skip"),
    ),
    "_efficientnet_blocks.MobileAttention": lambda m: m.has_skip + (m.conv_cpe_dw is not None),
    **_names("byobnet", "BasicBlock BottleneckBlock DarkBlock EdgeBlock SelfAttnBlock", _by_attribute("shortcut")),
    **_names("byobnet", "RepVggBlock MobileOneBlock", _by_attribute("identity")),
    **_names("non_local_attn", "NonLocalAttn BatNonLocalAttn", 1),
    "global_context.GlobalContext": _by_attribute("mlp_add"),  # the context, added at all positions
    "attention_pool.AttentionPoolLatent": 1,
    **_names("cait", "LayerScaleBlock LayerScaleBlockClassAttn", 2),
    "cait.Cait": -1,  # the class token's first shortcut is a parameter: no signal of any image
    **_names("coat", "SerialBlock", 3),  # position, attention, MLP
    "coat.ParallelBlock": 9,  # the same in three streams
    "convmixer.Residual": 1,
    "convnext.ConvNeXtBlock": 1,
    **_names("cpubone", "ResidualBlock", _by_attribute("shortcut")),
    **_names("lowformer", "ResidualBlock", _by_attribute("shortcut")),
    **_names("efficientvit_mit", "ResidualBlock", _by_attribute("shortcut")),
    "crossvit.CrossAttentionBlock": 1,
    **_names("csatv2", "Block PosConv", 1),
    **_names("csatv2", "SpatialTransformerBlock TransformerBlock", 2),
    **_names("cspnet", "BottleneckBlock DarkBlock EdgeBlock", 1),
    "cspnext.CspNextBlock": _by_attribute("add_identity"),
    "davit.ConvPosEnc": 1,
    **_names("davit", "ChannelBlock SpatialBlock", 2),
    **_names("dla", "DlaBasic DlaBottleneck DlaBottle2neck", 1),
    "dla.DlaRoot": _by_attribute("shortcut"),
    "dpn.DualPathBlock": 1,
    "edgenext.ConvBlock": 1,
    "edgenext.SplitTransposeBlock": 2,  # the block, and the cross-covariance attention in its branch
    **_names("efficientformer", "MetaBlock1d MetaBlock2d", 2),
    "efficientformer_v2.EfficientFormerV2Block": lambda m: 1 + (m.token_mixer is not None),
    "efficientformer_v2.Downsample": _by_attribute("attn"),
    "efficientformer_v2.LocalGlobalQuery": 1,
    "efficientvim.EfficientViMBlock": 4,
    "efficientvim.PatchMerging": 2,
    "efficientvit_msra.ResidualDrop": 1,
    **_names("eva", "EvaBlock EvaBlockPostNorm", 2),
    "fasternet.MLPBlock": 1,
    "fastvit.MobileOneBlock": _fastvit_mobile_one,
    **_names("fastvit", "RepMixer RepConditionalPosEnc RepMixerBlock", 1),
    "fastvit.AttentionBlock": 2,
    "focalnet.FocalNetBlock": 2,
    "gcvit.MbConvBlock": 1,
    "gcvit.GlobalContextVitBlock": 2,
    **_names("ghostnet", "GhostBottleneck GhostBottleneckV3", 1),
    "ghostnet.GhostModuleV3": lambda m: 1 + len(m.cheap_rpr_conv),  # batch-normed identity + 1x1 + 3x3 each
    "hgnet.HighPerfGpuBlock": _by_attribute("residual"),
    "hiera.HieraBlock": 2,
    "hieradet_sam2.MultiScaleBlock": 2,
    "iformer.Residual": 1,
    "inception_next.MetaNeXtBlock": 1,
    **_names("inception_resnet_v2", "Block35 Block17 Block8", 1),
    "lcnetv2.RepDepthwiseSeparable": _by_attribute("use_shortcut"),
    "levit.LevitBlock": 2,
    "levit.LevitDownsample": 1,
    "mambaout.GatedConvBlock": 1,
    **_names("maxxvit", "MbConvBlock ConvNeXtBlock", 1),
    **_names("maxxvit", "TransformerBlock2d PartitionAttentionCl PartitionAttention2d ParallelPartitionAttention", 2),
    "metaformer.MetaFormerBlock": 2,
    **_names("mlp_mixer", "MixerBlock ResBlock", 2),
    "mlp_mixer.SpatialGatingBlock": 1,
    "mobilevit.LinearTransformerBlock": 2,
    "mvitv2.MultiScaleBlock": 2,
    "nest.TransformerLayer": 2,
    "nextvit.NextConvBlock": 2,
    "nextvit.NextTransformerBlock": 3,
    "nfnet.NormFreeBlock": 1,
    "pvt_v2.Block": 2,
    **_names("regnet", "Bottleneck PreBottleneck", _by_attribute("downsample")),
    "repghost.RepGhostModule": lambda m: len(m.fusion_bn),
    "repghost.RepGhostBottleneck": 1,
    **_names("repvit", "RepVggDw RepViTBlock RepVitDownsample", 1),
    "res2net.Bottle2neck": 1,
    "resnest.ResNestBottleneck": 1,
    **_names("resnetv2", "PreActBasic PreActBottleneck Bottleneck", 1),
    "rexnet.LinearBottleneck": _by_attribute("use_shortcut"),
    **_names("senet", "Bottleneck SEResNetBlock", 1),
    "sequencer.Sequencer2dBlock": 2,
    "shvit.Residual": 1,
    **_names("sknet", "SelectiveKernelBasic SelectiveKernelBottleneck", 1),
    "starnet.Block": 1,
    **_names("swiftformer", "ConvEncoder EfficientAdditiveAttention LocalRepresentation", 1),
    "swin_transformer_v2.SwinTransformerV2Block": 2,
    "swin_transformer_v2_cr.SwinTransformerV2CrBlock": 2,
    "tiny_vit.MBConv": 1,
    "tiny_vit.TinyVitBlock": 2,
    "tnt.Block": 4,  # its pixel-to-patch additions join two streams
    **_names("tresnet", "BasicBlock Bottleneck", 1),
    "twins.PosConv": lambda m: int(m.stride == 1),
    "visformer.Block": lambda m: 1 + (m.attn is not None),
    **_names("vision_transformer", "Block ResPostBlock ParallelThingsBlock", 2),
    **_names("vision_transformer", "ParallelScalingBlock DiffParallelScalingBlock", 1),
    **_names("vision_transformer_relpos", "RelPosBlock ResPostRelPosBlock", 2),
    "vitamin.MbConvLNBlock": 1,
    **_names("volo", "Outlooker Transformer ClassBlock", 2),
    "vovnet.OsaBlock": _by_attribute("residual"),
    "xception.Block": 1,
    **_names("xception_aligned", "XceptionModule PreXceptionModule", lambda m: int(not m.no_skip)),
    "xcit.XCABlock": 3,
    "xcit.ClassAttentionBlock": 2,
    **{f"{module}.Block": 2 for module in ("beit", "convit", "swiftformer", "twins", "vision_transformer_sam")},
}


def stated_additions(model: nn.Module) -> int | None:
    """The number of residual additions in the authors' code; None where they leave it open.

    Args:
        model: a torchvision or timm model.

    Returns:
        The sum over its modules.
    """
    if any(type(model).__module__.endswith(f".{family}") for family in UNSTATED):
        return None
    return sum(_of(module) for module in model.modules())


def _of(module: nn.Module) -> int:
    for kind in type(module).__mro__:
        count = {**TORCHVISION, **TIMM}.get(f"{kind.__module__.rsplit('.')[-1]}.{kind.__name__}")
        if count is not None:
            return count if isinstance(count, int) else int(count(module))
    return 0
