"""Architectures of ``transformers`` and ``diffusers``: language, vision, speech, state spaces, generation."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.foreign_case import Built, Case, count


def _tokens(*shape: int, size: int = 64) -> torch.Tensor:
    return torch.randint(0, size, shape)


def _hf(name: str, config: str, batch: Any, **options: Any) -> Built:
    import transformers

    described = getattr(transformers, config)(**options)
    described.use_cache = False
    return (getattr(transformers, name)(described), batch)


def _case(
    name: str,
    field: str,
    build: Any,
    blocks: Any,
    counted: str,
    because: str,
    verdict: Any = "healthy",
    package: str = "transformers",
    fusions: int = 0,
) -> Case:
    return Case(
        name=f"{package}:{name}",
        package=package,
        field=field,
        build=build,
        blocks=blocks,
        counted=counted,
        verdict=verdict,
        because=because,
        fusions=fusions,
    )


SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "initializer_range": 0.07,
}


WORDS = {"vocab_size": 64}


def _layers(factor: int) -> Any:
    return lambda m: factor * m.config.num_hidden_layers


LANGUAGE = [
    _case(
        "Llama",
        "language",
        build=lambda: _hf("LlamaForCausalLM", "LlamaConfig", {"input_ids": _tokens(4, 16)}, **SMALL, **WORDS),
        blocks=_layers(2),
        counted="attention and MLP of each layer",
        because="RMSNorm before each branch",
    ),
    _case(
        "Mistral",
        "language",
        build=lambda: _hf(
            "MistralForCausalLM",
            "MistralConfig",
            {"input_ids": _tokens(4, 16)},
            **SMALL,
            **WORDS,
            num_key_value_heads=2,
        ),
        blocks=_layers(2),
        counted="attention and MLP of each layer",
        because="RMSNorm before each branch",
    ),
    _case(
        "Qwen3",
        "language",
        build=lambda: _hf(
            "Qwen3ForCausalLM",
            "Qwen3Config",
            {"input_ids": _tokens(4, 16)},
            **SMALL,
            **WORDS,
            num_key_value_heads=2,
            head_dim=16,
        ),
        blocks=_layers(2),
        counted="attention and MLP of each layer",
        because="RMSNorm before each branch",
    ),
    _case(
        "Gemma2",
        "language",
        build=lambda: _hf(
            "Gemma2ForCausalLM",
            "Gemma2Config",
            {"input_ids": _tokens(4, 16)},
            **SMALL,
            **WORDS,
            num_key_value_heads=2,
            head_dim=16,
        ),
        blocks=_layers(2),
        counted="attention and MLP of each layer",
        because="RMSNorm before and after each branch",
    ),
    _case(
        "GPT2",
        "language",
        build=lambda: _hf(
            "GPT2LMHeadModel",
            "GPT2Config",
            {"input_ids": _tokens(4, 16)},
            n_embd=64,
            n_layer=4,
            n_head=4,
            initializer_range=0.07,
            bos_token_id=1,
            eos_token_id=2,
            **WORDS,
        ),
        blocks=lambda m: 2 * m.config.n_layer,
        counted="attention and MLP of each layer",
        because="LayerNorm before each branch",
    ),
    _case(
        "BERT",
        "language",
        build=lambda: _hf("BertModel", "BertConfig", {"input_ids": _tokens(4, 16)}, **SMALL, **WORDS),
        blocks=_layers(2),
        counted="attention and MLP of each layer",
        because="LayerNorm after each addition",
    ),
    _case(
        "T5",
        "language",
        build=lambda: _hf(
            "T5ForConditionalGeneration",
            "T5Config",
            {"input_ids": _tokens(4, 16), "decoder_input_ids": _tokens(4, 12)},
            d_model=64,
            d_kv=16,
            d_ff=128,
            num_layers=3,
            num_heads=4,
            **WORDS,
        ),
        blocks=lambda m: 2 * m.config.num_layers + 3 * m.config.num_decoder_layers,
        counted="2 of each encoder layer, 3 of each decoder layer",
        because="RMSNorm before each branch",
    ),
    _case(
        "OPT",
        "language",
        build=lambda: _hf(
            "OPTForCausalLM",
            "OPTConfig",
            {"input_ids": _tokens(4, 16)},
            hidden_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            ffn_dim=128,
            init_std=0.07,
            word_embed_proj_dim=64,
            **WORDS,
        ),
        blocks=_layers(2),
        counted="attention and MLP of each layer",
        because="LayerNorm before each branch",
    ),
    _case(
        "ALBERT",
        "language",
        build=lambda: _hf(
            "AlbertModel", "AlbertConfig", {"input_ids": _tokens(4, 16)}, **SMALL, **WORDS, embedding_size=32
        ),
        blocks=_layers(2),
        counted="attention and MLP of each of the layers, which share their weights",
        because="LayerNorm after each addition",
    ),
    _case(
        "Mamba",
        "state spaces",
        build=lambda: _hf(
            "MambaModel",
            "MambaConfig",
            {"input_ids": _tokens(4, 16)},
            hidden_size=64,
            num_hidden_layers=4,
            state_size=8,
            **WORDS,
        ),
        blocks=_layers(2),
        counted="one addition around each mixer, and the state space model's own skip D in it",
        because="RMSNorm before each mixer",
    ),
    _case(
        "Mixtral",
        "language",
        build=lambda: _hf(
            "MixtralForCausalLM",
            "MixtralConfig",
            {"input_ids": _tokens(4, 16)},
            **SMALL,
            **WORDS,
            num_key_value_heads=2,
            num_local_experts=4,
        ),
        blocks=_layers(2),
        counted="attention and experts of each layer",
        because="RMSNorm before each branch",
    ),
]


PIXELS = {**SMALL, "image_size": 64}


def _images(size: int = 64, count: int = 4) -> torch.Tensor:
    return torch.randn(count, 3, size, size)


def _detr() -> Built:
    import transformers

    backbone = transformers.ResNetConfig(
        embedding_size=16,
        hidden_sizes=[16, 32, 64, 128],
        depths=[2, 2, 2, 2],
        layer_type="basic",
        out_features=["stage4"],
    )
    config = transformers.DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=backbone,
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        num_queries=10,
    )
    return (transformers.DetrForObjectDetection(config), {"pixel_values": _images()})


VISION = [
    _case(
        "ViT",
        "recognition",
        build=lambda: _hf("ViTModel", "ViTConfig", {"pixel_values": _images()}, **PIXELS),
        blocks=_layers(2),
        counted="attention and MLP of each layer",
        because="LayerNorm before each branch",
    ),
    _case(
        "DETR",
        "detection",
        build=_detr,
        blocks=lambda m: 8 + 2 * m.config.encoder_layers + 3 * m.config.decoder_layers - 2,
        counted="8 basic blocks; 2 an encoder layer, 3 a decoder layer, but for the first two, onto queries of zeros",
        because="frozen BatchNorm is the identity here: the backbone's variance grows, by less than 2 a block",
    ),
    _case(
        "ResNet",
        "recognition",
        build=lambda: _hf(
            "ResNetModel",
            "ResNetConfig",
            {"pixel_values": _images()},
            embedding_size=16,
            hidden_sizes=[16, 32, 64, 128],
            depths=[2, 2, 2, 2],
            layer_type="bottleneck",
        ),
        blocks=lambda m: sum(m.config.depths),
        counted="bottlenecks of the stages",
        because="BatchNorm after each convolution",
    ),
    _case(
        "RegNet",
        "recognition",
        build=lambda: _hf(
            "RegNetModel",
            "RegNetConfig",
            {"pixel_values": _images()},
            embedding_size=16,
            hidden_sizes=[16, 32, 64, 128],
            depths=[1, 2, 2, 1],
            groups_width=8,
        ),
        blocks=lambda m: sum(m.config.depths),
        counted="blocks of the stages",
        because="BatchNorm after each convolution",
    ),
    _case(
        "MobileNetV2",
        "recognition",
        build=lambda: _hf("MobileNetV2Model", "MobileNetV2Config", {"pixel_values": _images()}, depth_multiplier=0.5),
        blocks=lambda m: sum(layer.use_residual for layer in m.layer),
        counted="inverted residuals that keep the shape",
        because="BatchNorm after each convolution",
    ),
    _case(
        "ConvNextV2",
        "recognition",
        build=lambda: _hf(
            "ConvNextV2Model",
            "ConvNextV2Config",
            {"pixel_values": _images()},
            hidden_sizes=[16, 32, 64, 128],
            depths=[2, 2, 2, 2],
            initializer_range=0.07,
        ),
        blocks=lambda m: sum(m.config.depths),
        counted="layers of the stages; GRN's inner addition is no block",
        because="LayerNorm in each branch",
    ),
    _case(
        "CvT",
        "recognition",
        build=lambda: _hf(
            "CvtModel",
            "CvtConfig",
            {"pixel_values": _images()},
            embed_dim=[16, 32, 64],
            num_heads=[1, 2, 4],
            depth=[1, 2, 3],
            drop_path_rate=[0.0, 0.0, 0.0],
        ),
        blocks=lambda m: 2 * sum(m.config.depth),
        counted="attention and MLP of each layer",
        because="LayerNorm before each branch",
    ),
    _case(
        "Segformer",
        "segmentation",
        build=lambda: _hf(
            "SegformerForSemanticSegmentation",
            "SegformerConfig",
            {"pixel_values": _images()},
            hidden_sizes=[16, 32, 64, 128],
            decoder_hidden_size=32,
            depths=[1, 1, 1, 1],
            initializer_range=0.07,
        ),
        blocks=lambda m: 2 * sum(m.config.depths),
        counted="attention and MLP of each block",
        because="LayerNorm before each branch",
    ),
    _case(
        "Swinv2",
        "recognition",
        build=lambda: _hf(
            "Swinv2Model",
            "Swinv2Config",
            {"pixel_values": _images()},
            image_size=64,
            patch_size=4,
            embed_dim=16,
            initializer_range=0.1,
            depths=[2, 2],
            num_heads=[2, 4],
            window_size=4,
        ),
        blocks=lambda m: 2 * sum(m.config.depths),
        counted="attention and MLP of each layer",
        because="LayerNorm at the end of each branch",
    ),
    _case(
        "CLIP",
        "vision and language",
        build=lambda: _clip(),
        blocks=lambda m: 2 * (m.config.text_config.num_hidden_layers + m.config.vision_config.num_hidden_layers),
        counted="attention and MLP of each layer of both towers",
        because="LayerNorm before each branch",
    ),
    _case(
        "DPT",
        "depth",
        build=lambda: _hf(
            "DPTForDepthEstimation",
            "DPTConfig",
            {"pixel_values": _images()},
            **SMALL,
            image_size=64,
            patch_size=16,
            backbone_out_indices=[0, 1, 2, 3],
            neck_hidden_sizes=[16, 32, 64, 64],
            fusion_hidden_size=20,
            is_hybrid=False,
        ),
        blocks=lambda m: 2 * m.config.num_hidden_layers + 2 * len(m.neck.fusion_stage.layers) - 1,
        counted="attention and MLP; two residual units a fusion layer, one in the first",
        because="LayerNorm before each branch; the fusion's residual units have no norm, and are few",
        fusions=3,
    ),
]


def _clip() -> Built:
    import transformers

    text = {**SMALL, **WORDS, "max_position_embeddings": 16, "eos_token_id": 63, "bos_token_id": 0, "pad_token_id": 1}
    config = transformers.CLIPConfig(text_config=text, vision_config={**PIXELS, "patch_size": 16}, projection_dim=32)
    return (transformers.CLIPModel(config), {"input_ids": _tokens(4, 12), "pixel_values": _images()})


WAVES = {
    **SMALL,
    "num_hidden_layers": 3,
    "conv_dim": (32, 32, 32),
    "conv_stride": (5, 4, 2),
    "conv_kernel": (10, 8, 4),
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "mask_time_prob": 0.0,
    "layerdrop": 0.0,
}


SPEECH = [
    _case(
        "Wav2Vec2",
        "speech",
        build=lambda: _hf("Wav2Vec2Model", "Wav2Vec2Config", {"input_values": torch.randn(4, 4000)}, **WAVES),
        blocks=lambda m: 2 * m.config.num_hidden_layers + 1,
        counted="attention and MLP of each layer; the convolutional position embedding is added",
        because="GroupNorm in the first layer, LayerNorm after each addition",
    ),
    _case(
        "HuBERT",
        "speech",
        build=lambda: _hf("HubertModel", "HubertConfig", {"input_values": torch.randn(4, 4000)}, **WAVES),
        blocks=lambda m: 2 * m.config.num_hidden_layers + 1,
        counted="attention and MLP of each layer; the convolutional position embedding is added",
        because="GroupNorm in the first layer, LayerNorm after each addition",
    ),
    _case(
        "Whisper",
        "speech",
        build=lambda: _hf(
            "WhisperModel",
            "WhisperConfig",
            {"input_features": torch.randn(4, 16, 64), "decoder_input_ids": _tokens(4, 8)},
            vocab_size=64,
            num_mel_bins=16,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            d_model=64,
            encoder_ffn_dim=128,
            decoder_ffn_dim=128,
            max_source_positions=32,
            max_target_positions=16,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
        ),
        blocks=lambda m: 2 * m.config.encoder_layers + 3 * m.config.decoder_layers,
        counted="2 of each encoder layer, 3 of each decoder layer",
        because="LayerNorm before each branch",
    ),
    _case(
        "Encodec",
        "audio codec",
        build=lambda: _hf(
            "EncodecModel",
            "EncodecConfig",
            {"input_values": torch.randn(4, 1, 3200)},
            num_filters=8,
            hidden_size=32,
            codebook_dim=32,
            upsampling_ratios=[4, 4, 2, 2],
        ),
        blocks=lambda m: 2 * len(m.config.upsampling_ratios) + 2,
        counted="a residual unit a ratio in encoder and decoder, and around each LSTM; sums of code vectors are none",
        because="no norm but the weights', and torch's initialisation: ten strided layers lose a factor of 3 to 6 each",
        verdict="sick",
    ),
    _case(
        "Dac",
        "audio codec",
        build=lambda: _hf(
            "DacModel",
            "DacConfig",
            {"input_values": torch.randn(4, 1, 2048)},
            encoder_hidden_size=8,
            downsampling_ratios=[2, 4, 4],
            decoder_hidden_size=64,
            n_codebooks=2,
            codebook_size=32,
            codebook_dim=4,
            hidden_size=64,
        ),
        blocks=lambda m: 3 * 2 * len(m.config.downsampling_ratios),
        counted="three residual units a ratio in encoder and decoder; the quantizer's sums are none",
        because="no norm: Snake activations and truncated normal weights of a small constant deviation",
        verdict="sick",
    ),
    _case(
        "AST",
        "audio",
        build=lambda: _hf(
            "ASTModel", "ASTConfig", {"input_values": torch.randn(4, 64, 32)}, **SMALL, max_length=64, num_mel_bins=32
        ),
        blocks=_layers(2),
        counted="attention and MLP of each layer",
        because="LayerNorm before each branch",
    ),
]


TIME = [
    _case(
        "PatchTST",
        "time series",
        build=lambda: _hf(
            "PatchTSTForPrediction",
            "PatchTSTConfig",
            {"past_values": torch.randn(4, 64, 3)},
            num_input_channels=3,
            context_length=64,
            patch_length=8,
            patch_stride=8,
            d_model=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            ffn_dim=64,
            prediction_length=8,
        ),
        blocks=_layers(2),
        counted="attention and MLP of each layer",
        because="BatchNorm around each branch",
    )
]


def _diffusers(name: str, batch: Any, **options: Any) -> Built:
    import diffusers

    return (getattr(diffusers, name)(**options), batch)


DIFFUSERS = [
    _case(
        "UNet2DModel",
        "generation",
        build=lambda: _diffusers(
            "UNet2DModel",
            {"sample": torch.randn(2, 3, 32, 32), "timestep": torch.tensor([3, 70])},
            sample_size=32,
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=8,
            attention_head_dim=16,
        ),
        blocks=lambda m: count(m, "ResnetBlock2D", "Attention"),
        counted="ResnetBlock2Ds and attentions; the time embedding is added to a branch and is no shortcut",
        because="GroupNorm before each convolution",
        package="diffusers",
    ),
    _case(
        "UNet2DConditionModel",
        "generation",
        build=lambda: _diffusers(
            "UNet2DConditionModel",
            {
                "sample": torch.randn(2, 4, 16, 16),
                "timestep": torch.tensor([3, 70]),
                "encoder_hidden_states": torch.randn(2, 5, 32),
            },
            sample_size=16,
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            norm_num_groups=8,
            attention_head_dim=4,
            cross_attention_dim=32,
        ),
        blocks=lambda m: (
            count(m, "ResnetBlock2D") + count(m, "Transformer2DModel") + 3 * count(m, "BasicTransformerBlock")
        ),
        counted="ResnetBlock2Ds; three of each transformer block and one around it",
        because="GroupNorm and LayerNorm before each branch",
        package="diffusers",
    ),
    _case(
        "DiT",
        "generation",
        build=lambda: _diffusers(
            "DiTTransformer2DModel",
            {
                "hidden_states": torch.randn(4, 4, 16, 16),
                "timestep": torch.tensor([3, 70, 500, 900]),
                "class_labels": torch.tensor([1, 2, 3, 4]),
            },
            num_attention_heads=4,
            attention_head_dim=16,
            num_layers=3,
            sample_size=16,
            num_embeds_ada_norm=1000,
            out_channels=4,
        ),
        blocks=lambda m: 2 * m.config.num_layers,
        counted="attention and MLP of each block",
        because="LayerNorm before each branch",
        package="diffusers",
    ),
    _case(
        "AutoencoderKL",
        "generation",
        build=lambda: _diffusers(
            "AutoencoderKL",
            torch.randn(2, 3, 32, 32),
            block_out_channels=(32, 64),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1,
            norm_num_groups=8,
            latent_channels=4,
        ),
        blocks=lambda m: count(m, "ResnetBlock2D", "Attention"),
        counted="ResnetBlock2Ds and the attention in the middle of encoder and decoder",
        because="GroupNorm before each convolution",
        package="diffusers",
    ),
    _case(
        "VQModel",
        "generation",
        build=lambda: _diffusers(
            "VQModel",
            torch.randn(2, 3, 32, 32),
            block_out_channels=(32, 64),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1,
            norm_num_groups=8,
            latent_channels=4,
            num_vq_embeddings=16,
        ),
        blocks=lambda m: count(m, "ResnetBlock2D", "Attention"),
        counted="ResnetBlock2Ds and the middle's attentions; the straight-through estimator is none",
        because="GroupNorm, but behind an untrained codebook of 16 nearly equal vectors all inputs are alike",
        verdict="sick",
        package="diffusers",
    ),
]


CASES = [*LANGUAGE, *VISION, *SPEECH, *TIME, *DIFFUSERS]
