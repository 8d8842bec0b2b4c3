"""Architectures of smaller libraries: tables, graphs, time series, sound, video, flows, control, physics."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import nn

from benchmarks.foreign_case import Built, Case, count


def _of(module: str, name: str) -> Any:
    return getattr(import_module(module), name)


def _case(name: str, package: str, field: str, build: Any, blocks: Any, counted: str, because: str, verdict: Any = "healthy", fusions: int = 0) -> Case:
    return Case(name=name, package=package, field=field, build=build, blocks=blocks, counted=counted, verdict=verdict, because=because, fusions=fusions)


def _table(count: int = 64, categories: int = 3, numbers: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randint(0, 5, (count, categories)), torch.randn(count, numbers)


def _graph(nodes: int = 64, edges: int = 256, width: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(nodes, width), torch.randint(0, nodes, (2, edges))


def _fastai_tabular() -> Built:
    return _of("fastai.tabular.model", "TabularModel")([(6, 4)] * 3, 6, 3, [64, 64, 64, 32]), _table()


def _fastai_unet() -> Built:
    body = _of("fastai.vision.models.xresnet", "xresnet18")(n_out=10)
    encoder = nn.Sequential(*list(body.children())[:-3])
    return _of("fastai.vision.models.unet", "DynamicUnet")(encoder, 3, (64, 64)), torch.randn(4, 3, 64, 64)


FASTAI = [
    _case("fastai:TabularModel", "fastai", "tables", _fastai_tabular, 0, "a chain of Linear, ReLU and BatchNorm", "BatchNorm after each activation"),
    _case("fastai:xresnet18", "fastai", "recognition", lambda: (_of("fastai.vision.models.xresnet", "xresnet18")(n_out=10), torch.randn(4, 3, 64, 64)), lambda m: count(m, "ResBlock"), "ResBlocks", "BatchNorm after each convolution"),
    _case("fastai:xse_resnext18", "fastai", "recognition", lambda: (_of("fastai.vision.models.xresnet", "xse_resnext18")(n_out=10), torch.randn(4, 3, 64, 64)), lambda m: count(m, "ResBlock"), "ResBlocks", "BatchNorm after each convolution"),
    _case("fastai:DynamicUnet", "fastai", "segmentation", _fastai_unet, lambda m: count(m, "ResBlock"), "ResBlocks of the encoder and of the last layer; levels are concatenated", "BatchNorm in the encoder, weights initialised for ReLU in the decoder"),
    _case("fastai:AWD_LSTM", "fastai", "language", lambda: (_of("fastai.text.models.awdlstm", "AWD_LSTM")(64, 32, 64, 2), torch.randint(0, 64, (4, 12))), 0, "two LSTMs in a chain", "gates bound the state"),
]


def _gnn(kind: str, **options: Any) -> Built:
    return _of("torch_geometric.nn", kind)(8, 32, 8, 3, norm="batch_norm", **options), _graph()


def _deep_gcn() -> Built:
    layer, conv = _of("torch_geometric.nn", "DeepGCNLayer"), _of("torch_geometric.nn", "GENConv")

    class DeeperGCN(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Linear(8, 32)
            self.layers = nn.ModuleList(layer(conv(32, 32, aggr="softmax", t=1.0, num_layers=2, norm="layer"), nn.LayerNorm(32), nn.ReLU(), block="res+") for _ in range(6))
            self.head = nn.Linear(32, 3)

        def forward(self, x: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
            x = self.encoder(x)
            for each in self.layers:
                x = each(x, edges)
            return self.head(x)

    return DeeperGCN(), _graph()


GRAPHS = [
    _case("pyg:GCN", "torch-geometric", "graphs", lambda: _gnn("GCN"), 0, "message passing in a chain", "BatchNorm after each aggregation"),
    _case("pyg:GIN", "torch-geometric", "graphs", lambda: _gnn("GIN"), 0, "a node's own features are added to its neighbours' inside the aggregation, not around weights", "BatchNorm after each layer"),
    _case("pyg:GAT", "torch-geometric", "graphs", lambda: _gnn("GAT", heads=2), 0, "message passing in a chain", "BatchNorm after each aggregation"),
    _case("pyg:GraphSAGE", "torch-geometric", "graphs", lambda: _gnn("GraphSAGE"), 0, "a node's own features pass a layer of their own and are added, which is no shortcut", "BatchNorm after each aggregation"),
    _case("pyg:PNA", "torch-geometric", "graphs", lambda: _gnn("PNA", aggregators=["mean", "max", "std"], scalers=["identity", "amplification"], deg=torch.tensor([0, 8, 16, 24, 16])), 0, "message passing in a chain", "BatchNorm after each aggregation"),
    _case("pyg:DeeperGCN", "torch-geometric", "graphs", _deep_gcn, lambda m: len(m.layers), "one addition around each layer; GENConv adds a node to its neighbours without any weight between", "LayerNorm before each branch"),
    _case("pyg:GraphUNet", "torch-geometric", "graphs", lambda: (_of("torch_geometric.nn", "GraphUNet")(8, 16, 8, 3), _graph()), 0, "levels are added (fusions)", "no normalization, four layers deep"),
]


def _tsai(module: str, name: str, *arguments: Any, **options: Any) -> Built:
    return _of(f"tsai.models.{module}", name)(*arguments, **options), torch.randn(8, 3, 64)


SERIES = [
    _case("tsai:InceptionTime", "tsai", "time series", lambda: _tsai("InceptionTime", "InceptionTime", 3, 4), lambda m: len(m.inceptionblock.shortcut), "one shortcut every third module", "BatchNorm after each convolution"),
    _case("tsai:ResNet", "tsai", "time series", lambda: _tsai("ResNet", "ResNet", 3, 4), lambda m: count(m, "ResBlock"), "ResBlocks", "BatchNorm after each convolution"),
    _case("tsai:TCN", "tsai", "time series", lambda: _tsai("TCN", "TCN", 3, 4, layers=[16] * 5), lambda m: count(m, "TemporalBlock"), "temporal blocks", "weight norm with weights of a deviation of 0.01, and a shortcut around each block"),
    _case("tsai:XceptionTime", "tsai", "time series", lambda: _tsai("XceptionTime", "XceptionTime", 3, 4), lambda m: len(m.block.shortcut), "one shortcut every second module", "BatchNorm after each block"),
    _case("tsai:LSTM_FCN", "tsai", "time series", lambda: _tsai("RNN_FCN", "LSTM_FCN", 3, 4, seq_len=64), 0, "two branches are concatenated", "BatchNorm after each convolution"),
    _case("tsai:TSTPlus", "tsai", "time series", lambda: _tsai("TSTPlus", "TSTPlus", 3, 4, 64, n_layers=3, d_model=32, n_heads=4, d_ff=64), lambda m: 2 * 3, "attention and MLP of each layer", "BatchNorm after each addition"),
    _case("tsai:OmniScaleCNN", "tsai", "time series", lambda: _tsai("OmniScaleCNN", "OmniScaleCNN", 3, 4, 64, layers=[8 * 16, 5 * 16 * 4, 16 * 16]), 0, "convolutions of many sizes are concatenated", "BatchNorm after each convolution"),
    _case("pytorch-tcn:TCN", "pytorch-tcn", "time series", lambda: (_of("pytorch_tcn", "TCN")(3, [16] * 5, use_norm="batch_norm", causal=True), torch.randn(8, 3, 64)), lambda m: len(m.network), "temporal blocks", "BatchNorm after each convolution"),
]


def _yolo(file: str, size: int = 64, **options: Any) -> Built:
    tasks = import_module("ultralytics.nn.tasks")
    kind = {"cls": "ClassificationModel", "seg": "SegmentationModel", "pose": "PoseModel"}.get(file.partition(".")[0].partition("-")[2], "DetectionModel")
    return getattr(tasks, kind)(file, verbose=False), torch.randn(4, 3, size, size)


def _yolo_blocks(model: Any) -> int:
    bottlenecks = sum(bool(m.add) for m in model.modules() if type(m).__name__ in ("Bottleneck", "CIB"))
    attention = sum(2 * getattr(m, "add", True) for m in model.modules() if type(m).__name__ in ("PSABlock", "PSA"))
    return bottlenecks + attention


YOLO = [
    _case(f"ultralytics:{file}", "ultralytics", field, lambda file=file: _yolo(f"{file}.yaml"), _yolo_blocks, "bottlenecks that add, and two of each attention block; levels are concatenated", "BatchNorm after each convolution")
    for file, field in (("yolov8n", "detection"), ("yolo11n", "detection"), ("yolov5n", "detection"), ("yolov8n-seg", "segmentation"), ("yolo11n-cls", "recognition"), ("yolov10n", "detection"))
]

IMAGES = [
    _case("efficientnet-pytorch:b0", "efficientnet-pytorch", "recognition", lambda: (_of("efficientnet_pytorch", "EfficientNet").from_name("efficientnet-b0", num_classes=10), torch.randn(4, 3, 64, 64)), lambda m: sum(b.id_skip and b._block_args.stride in (1, [1]) and b._block_args.input_filters == b._block_args.output_filters for b in m._blocks), "MBConv blocks of stride 1 and equal widths", "BatchNorm after each convolution"),
    _case("open-clip:RN50", "open-clip-torch", "vision and language", lambda: _open_clip([2, 2, 2, 2]), lambda m: count(m.visual, "Bottleneck") + 2 * count(m, "ResidualAttentionBlock"), "bottlenecks of the vision tower, two of each text block", "BatchNorm and LayerNorm"),
    _case("open-clip:ViT", "open-clip-torch", "vision and language", lambda: _open_clip(3), lambda m: 2 * count(m, "ResidualAttentionBlock"), "attention and MLP of each block of both towers", "LayerNorm before each branch"),
    _case("open-clip:CoCa", "open-clip-torch", "vision and language", lambda: _coca(), lambda m: 2 * count(m, "ResidualAttentionBlock"), "attention and MLP of each block", "LayerNorm before each branch"),
    _case("vit-pytorch:ViT", "vit-pytorch", "recognition", lambda: (_of("vit_pytorch", "ViT")(image_size=64, patch_size=16, num_classes=10, dim=64, depth=4, heads=4, mlp_dim=128), torch.randn(4, 3, 64, 64)), 8, "attention and MLP of each of four layers", "LayerNorm before each branch"),
    _case("vit-pytorch:MobileViT", "vit-pytorch", "recognition", lambda: (_of("vit_pytorch.mobile_vit", "MobileViT")(image_size=(64, 64), dims=[32, 48, 64], channels=[16, 16, 24, 24, 32, 32, 48, 48, 64, 64, 128], num_classes=10), torch.randn(4, 3, 64, 64)), lambda m: sum(b.use_res_connect for b in m.modules() if type(b).__name__ == "MV2Block") + 2 * (2 + 4 + 3), "inverted residuals that add, and two of each transformer layer", "BatchNorm and LayerNorm"),
    _case("vit-pytorch:CCT", "vit-pytorch", "recognition", lambda: (_of("vit_pytorch.cct", "CCT")(img_size=64, embedding_dim=64, n_conv_layers=2, num_layers=4, num_heads=4, mlp_ratio=2.0, num_classes=10), torch.randn(4, 3, 64, 64)), 8, "attention and MLP of each of four layers", "LayerNorm before each branch"),
    _case("vit-pytorch:CvT", "vit-pytorch", "recognition", lambda: (_of("vit_pytorch.cvt", "CvT")(num_classes=10, s1_emb_dim=16, s2_emb_dim=32, s3_emb_dim=64, s3_depth=3, s1_heads=1, s2_heads=2, s3_heads=2), torch.randn(4, 3, 64, 64)), 2 * (1 + 2 + 3), "attention and MLP of each layer", "LayerNorm before each branch"),
    _case("vit-pytorch:SimpleViT-1d", "vit-pytorch", "time series", lambda: (_of("vit_pytorch.simple_vit_1d", "SimpleViT")(seq_len=64, patch_size=8, num_classes=10, dim=64, depth=3, heads=4, mlp_dim=128), torch.randn(4, 3, 64)), 6, "attention and MLP of each of three layers", "LayerNorm before each branch"),
    _case("kornia:HardNet", "kornia", "local features", lambda: (_of("kornia.feature", "HardNet")(pretrained=False), torch.randn(16, 1, 32, 32)), 0, "a chain of seven convolutions", "BatchNorm after each convolution"),
    _case("kornia:DexiNed", "kornia", "edges", lambda: (_of("kornia.filters.dexined", "DexiNed")(pretrained=False), torch.randn(2, 3, 64, 64)), lambda m: 2 + 3 + 3 + 3, "each dense layer is averaged with the block's side input; side outputs between the blocks are fusions", "BatchNorm after each convolution", fusions=4),
    _case("kornia:TinyViT", "kornia", "recognition", lambda: (_of("kornia.contrib", "TinyViT")(img_size=64, num_classes=10, embed_dims=(32, 32, 64, 64), depths=(1, 1, 2, 1), num_heads=(1, 2, 2, 2), window_sizes=(4, 4, 4, 2)), torch.randn(4, 3, 64, 64)), lambda m: count(m, "MBConv") + 2 * count(m, "TinyViTBlock"), "MBConvs; attention and MLP of each block", "BatchNorm and LayerNorm"),
    _case("facenet:InceptionResnetV1", "facenet-pytorch", "faces", lambda: (_of("facenet_pytorch", "InceptionResnetV1")(pretrained=None, classify=True, num_classes=10), torch.randn(4, 3, 96, 96)), lambda m: count(m, "Block35", "Block17", "Block8"), "Inception-ResNet blocks", "BatchNorm after each convolution, branches scaled by 0.1 to 0.2"),
]


def _open_clip(layers: Any) -> Built:
    model = _of("open_clip", "CLIP")(embed_dim=32, vision_cfg={"layers": layers, "width": 16 if isinstance(layers, list) else 64, "image_size": 64, "patch_size": 16, "head_width": 16}, text_cfg={"context_length": 12, "vocab_size": 64, "width": 64, "heads": 4, "layers": 3})
    return model, {"image": torch.randn(4, 3, 64, 64), "text": torch.randint(1, 64, (4, 12))}


def _coca() -> Built:
    text = {"context_length": 12, "vocab_size": 64, "width": 64, "heads": 4, "layers": 2, "embed_cls": True, "output_tokens": True}
    decoder = {"context_length": 12, "vocab_size": 64, "width": 64, "heads": 4, "layers": 2}
    vision = {"layers": 3, "width": 64, "image_size": 64, "patch_size": 16, "head_width": 16, "attentional_pool": True, "attn_pooler_heads": 4, "output_tokens": True}
    return _of("open_clip", "CoCa")(64, decoder, text, vision), {"image": torch.randn(4, 3, 64, 64), "text": torch.randint(1, 64, (4, 12))}


TABLES = [
    _case("tabnet:TabNet", "pytorch-tabnet", "tables", lambda: (_of("pytorch_tabnet.tab_network", "TabNet")(8, 3, n_d=16, n_a=16, n_steps=3, group_attention_matrix=torch.eye(8)), torch.randn(256, 8)), lambda m: sum(len(block.glu_layers) - block.first for block in m.modules() if type(block).__name__ == "GLU_Block"), "each gated layer of a feature transformer but the first adds its input, scaled by √½", "ghost BatchNorm after each layer"),
    _case("rtdl:MLP", "rtdl-revisiting-models", "tables", lambda: (_of("rtdl_revisiting_models", "MLP")(d_in=8, d_out=3, n_blocks=6, d_block=64, dropout=0.1), torch.randn(64, 8)), 0, "a chain of Linear, ReLU, Dropout", "torch's initialisation, without any normalizer: variance falls by about six a layer", "sick"),
    _case("rtdl:ResNet", "rtdl-revisiting-models", "tables", lambda: (_of("rtdl_revisiting_models", "ResNet")(d_in=8, d_out=3, n_blocks=4, d_block=64, d_hidden_multiplier=2.0, dropout1=0.1, dropout2=0.0), torch.randn(64, 8)), 4, "blocks", "BatchNorm before each branch"),
    _case("rtdl:FTTransformer", "rtdl-revisiting-models", "tables", lambda: (_of("rtdl_revisiting_models", "FTTransformer")(n_cont_features=6, cat_cardinalities=[5, 5, 5], d_out=3, n_blocks=3, d_block=32, attention_n_heads=4, attention_dropout=0.1, ffn_d_hidden_multiplier=2.0, ffn_dropout=0.1, residual_dropout=0.0), tuple(reversed(_table()))), 6, "attention and MLP of each of three blocks", "LayerNorm before each branch"),
    _case("tab-transformer:FTTransformer", "tab-transformer-pytorch", "tables", lambda: (_of("tab_transformer_pytorch", "FTTransformer")(categories=(5, 5, 5), num_continuous=6, dim=32, dim_out=3, depth=3, heads=4), _table()), 6, "attention and MLP of each of three layers", "LayerNorm before each branch"),
    _case("tabm:TabM", "tabm", "tables", lambda: (_of("tabm", "TabM").make(n_num_features=6, cat_cardinalities=[5, 5, 5], d_out=3, k=4, n_blocks=3, d_block=64), tuple(reversed(_table()))), 0, "an ensemble of chains of Linear and ReLU", "three layers deep, no normalizer needed"),
]

GENERATION = [
    _case("denoising-diffusion:Unet", "denoising-diffusion-pytorch", "generation", lambda: (_of("denoising_diffusion_pytorch", "Unet")(dim=16, dim_mults=(1, 2, 4), flash_attn=False), (torch.randn(4, 3, 32, 32), torch.randint(0, 100, (4,)))), lambda m: count(m, "ResnetBlock", "LinearAttention", "Attention"), "ResnetBlocks and attentions", "RMSNorm after each convolution"),
    _case("x-transformers:decoder", "x-transformers", "language", lambda: (_of("x_transformers", "TransformerWrapper")(num_tokens=64, max_seq_len=32, attn_layers=_of("x_transformers", "Decoder")(dim=64, depth=4, heads=4, use_rmsnorm=True, ff_glu=True, rotary_pos_emb=True)), torch.randint(0, 64, (4, 16))), 8, "attention and MLP of each of four layers", "RMSNorm before each branch"),
    _case("x-transformers:sandwich", "x-transformers", "language", lambda: (_of("x_transformers", "TransformerWrapper")(num_tokens=64, max_seq_len=32, attn_layers=_of("x_transformers", "Encoder")(dim=64, depth=4, heads=4, sandwich_norm=True, use_scalenorm=True)), torch.randint(0, 64, (4, 16))), 8, "attention and MLP of each of four layers", "norms before and after each branch"),
    _case("nflows:RealNVP", "nflows", "flows", lambda: _nflow(), lambda m: count(m, "ResidualBlock"), "residual blocks of each coupling's network", "BatchNorm before each convolution of a block, and last weights of 0.001"),
    _case("normflows:RealNVP", "normflows", "flows", lambda: _realnvp(), 0, "couplings in a chain", "zero-initialised last layers make each coupling the identity"),
    _case("normflows:Glow", "normflows", "flows", lambda: _glow(), 0, "couplings in a chain", "zero-initialised last layers make each coupling the identity"),
]


def _nflow() -> Built:
    flow = _of("nflows.flows.realnvp", "SimpleRealNVP")(8, 32, 4, 2, batch_norm_within_layers=True)
    return flow._transform, torch.randn(32, 8)


def _realnvp() -> Built:
    import normflows as nf

    flows = []
    for _ in range(4):
        flows += [nf.flows.AffineCouplingBlock(nf.nets.MLP([4, 32, 32, 8], init_zeros=True)), nf.flows.Permute(8, mode="swap"), nf.flows.ActNorm(8)]
    return nf.NormalizingFlow(nf.distributions.DiagGaussian(8), flows), torch.randn(32, 8)


def _glow() -> Built:
    import normflows as nf

    flows = [nf.flows.GlowBlock(4, 16, split_mode="channel", scale=True) for _ in range(4)]

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flows = nn.ModuleList(flows)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for flow in self.flows:
                x, _ = flow(x)
            return x

    return Chain(), torch.randn(8, 4, 16, 16)


SOUND = [
    _case("asteroid:TDConvNet", "asteroid", "speech separation", lambda: (_of("asteroid.masknn", "TDConvNet")(32, 2, n_blocks=4, n_repeats=2, bn_chan=32, hid_chan=64, skip_chan=32), torch.randn(4, 32, 100)), lambda m: 8, "one addition a block to the stream; those to the sum of skip outputs are fusions", "a norm after each convolution but the last of a branch", fusions=7),
    _case("asteroid:DPRNN", "asteroid", "speech separation", lambda: (_of("asteroid.masknn", "DPRNN")(32, 2, bn_chan=32, hid_size=32, chunk_size=20, n_repeats=3), torch.randn(4, 32, 100)), lambda m: 6, "two of each of three dual-path blocks", "a norm at the end of each branch"),
    _case("asteroid:ConvTasNet", "asteroid", "speech separation", lambda: (_of("asteroid.models", "ConvTasNet")(2, n_filters=32, n_blocks=4, n_repeats=2, bn_chan=32, hid_chan=64, skip_chan=32), torch.randn(4, 1600)), lambda m: 8, "one addition a block to the stream; those to the sum of skip outputs are fusions", "a norm after each convolution but the last of a branch", fusions=7),
    _case("demucs:Demucs", "demucs", "music separation", lambda: (_of("demucs.demucs", "Demucs")(sources=["a", "b"], channels=8, depth=4, norm_starts=2, resample=False), torch.randn(2, 2, 8192)), lambda m: sum(len(d.layers) for d in m.modules() if type(d).__name__ == "DConv"), "dilated branches of the encoder; the decoder's additions of encoder maps are fusions", "branches have GroupNorm and a layer scale of 1e-4; the outer layers have none, and rescaled weights", fusions=4),
    _case("conformer:Conformer", "conformer", "speech", lambda: (_of("conformer", "Conformer")(64, depth=3, dim_head=16, heads=4), torch.randn(4, 32, 64)), 12, "two half MLPs, attention and convolution of each of three blocks", "LayerNorm before each branch"),
]

RESTORATION = [
    _case("spandrel:ESRGAN", "spandrel", "restoration", lambda: (_of("spandrel.architectures.ESRGAN.__arch.RRDB", "RRDBNet")(num_filters=16, num_blocks=3), torch.randn(2, 3, 24, 24)), lambda m: 4 * 3 + 1, "three dense blocks and one addition around them in each of three, and one around all", "no normalizer: branches are scaled by 0.2"),
]

VIDEO = [
    _case("pytorchvideo:x3d", "pytorchvideo", "video", lambda: (_of("pytorchvideo.models.x3d", "create_x3d")(input_clip_length=4, input_crop_size=64, model_num_class=10), torch.randn(2, 3, 4, 64, 64)), lambda m: count(m, "ResBlock"), "bottlenecks", "BatchNorm after each convolution"),
    _case("pytorchvideo:slow_r50", "pytorchvideo", "video", lambda: (_of("pytorchvideo.models", "create_resnet")(model_num_class=10, head_pool_kernel_size=(4, 2, 2)), torch.randn(2, 3, 4, 64, 64)), lambda m: count(m, "ResBlock"), "bottlenecks", "BatchNorm after each convolution"),
]


def _nnunet(residual: bool) -> Built:
    unet = _of("dynamic_network_architectures.architectures.unet", "ResidualEncoderUNet" if residual else "PlainConvUNet")
    blocks = {"n_blocks_per_stage": [1, 2, 2, 2]} if residual else {"n_conv_per_stage": 2}
    model = unet(1, 4, (8, 16, 32, 64), nn.Conv3d, 3, (1, 2, 2, 2), num_classes=2, n_conv_per_stage_decoder=1 if residual else 2, conv_bias=True, norm_op=nn.InstanceNorm3d, norm_op_kwargs={"affine": True}, nonlin=nn.LeakyReLU, nonlin_kwargs={"inplace": True}, **blocks)
    return model, torch.randn(2, 1, 32, 32, 32)


NNUNET = [
    _case("nnunet:PlainConvUNet", "dynamic-network-architectures", "medical volumes", lambda: _nnunet(False), 0, "levels are concatenated, blocks are plain", "InstanceNorm after each convolution"),
    _case("nnunet:ResidualEncoderUNet", "dynamic-network-architectures", "medical volumes", lambda: _nnunet(True), lambda m: count(m, "BasicBlockD", "BottleneckD"), "residual blocks of the encoder", "InstanceNorm after each convolution"),
]

def _smooth(examples: int, channels: int, size: int) -> torch.Tensor:
    """Random fields of unit variance and few frequencies, as solutions of equations are."""
    coarse = torch.randn(examples, channels, 5, 5)
    fields = nn.functional.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=True)
    return fields / fields.std()


PHYSICS = [
    _case("neuralop:FNO", "neuraloperator", "physics", lambda: (_of("neuralop.models", "FNO")(n_modes=(8, 8), in_channels=1, out_channels=1, hidden_channels=16, n_layers=4), _smooth(4, 1, 32)), lambda m: 2 * 4, "the spectral path and the channel MLP of each layer are added to a shortcut", "no normalizer"),
    _case("e3nn:FullyConnectedNet", "e3nn", "molecules", lambda: _e3nn(), 0, "a chain of linear layers", "weights of unit variance scaled by 1/√fan-in"),
]


def _e3nn() -> Built:
    return _of("e3nn.nn", "FullyConnectedNet")([16, 64, 64, 64, 8], torch.nn.functional.silu), torch.randn(64, 16)


def _policy(kind: str) -> Built:
    import gymnasium

    pixels = gymnasium.spaces.Box(0, 255, (3, 64, 64), dtype="uint8")
    vector = gymnasium.spaces.Box(-1.0, 1.0, (8,))
    policy = _of("stable_baselines3.common.policies", kind)
    images = "Cnn" in kind
    model = policy(pixels if images else vector, gymnasium.spaces.Discrete(4), lambda _: 1e-3)
    return model, torch.randint(0, 255, (8, 3, 64, 64)).float() if images else torch.randn(64, 8)


CONTROL = [
    _case("stable-baselines3:ActorCriticCnnPolicy", "stable-baselines3", "control", lambda: _policy("ActorCriticCnnPolicy"), 0, "three convolutions and two heads", "orthogonal weights with the gain of ReLU; the policy's head is scaled by 0.01"),
    _case("stable-baselines3:ActorCriticPolicy", "stable-baselines3", "control", lambda: _policy("ActorCriticPolicy"), 0, "two layers for each of policy and value", "orthogonal weights; the policy's head is scaled by 0.01"),
]


CASES = [*FASTAI, *GRAPHS, *SERIES, *YOLO, *IMAGES, *TABLES, *GENERATION, *SOUND, *RESTORATION, *VIDEO, *NNUNET, *PHYSICS, *CONTROL]
