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
    return getattr(transformers, name)(described), batch


def _case(name: str, field: str, build: Any, blocks: Any, counted: str, because: str, verdict: Any = "healthy", package: str = "transformers", fusions: int = 0) -> Case:
    return Case(name=f"{package}:{name}", package=package, field=field, build=build, blocks=blocks, counted=counted, verdict=verdict, because=because, fusions=fusions)


SMALL = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128, "initializer_range": 0.07}
"""Of BERT's shape at a twelfth of its width, and so with a deviation of its 0.02 times √12."""

WORDS = {"vocab_size": 64}


def _layers(factor: int) -> Any:
    return lambda m: factor * m.config.num_hidden_layers


LANGUAGE = [
    _case("Llama", "language", lambda: _hf("LlamaForCausalLM", "LlamaConfig", {"input_ids": _tokens(4, 16)}, **SMALL, **WORDS), _layers(2), "attention and MLP of each layer", "RMSNorm before each branch"),
    _case("Mistral", "language", lambda: _hf("MistralForCausalLM", "MistralConfig", {"input_ids": _tokens(4, 16)}, **SMALL, **WORDS, num_key_value_heads=2), _layers(2), "attention and MLP of each layer", "RMSNorm before each branch"),
    _case("Qwen3", "language", lambda: _hf("Qwen3ForCausalLM", "Qwen3Config", {"input_ids": _tokens(4, 16)}, **SMALL, **WORDS, num_key_value_heads=2, head_dim=16), _layers(2), "attention and MLP of each layer", "RMSNorm before each branch"),
    _case("Gemma2", "language", lambda: _hf("Gemma2ForCausalLM", "Gemma2Config", {"input_ids": _tokens(4, 16)}, **SMALL, **WORDS, num_key_value_heads=2, head_dim=16), _layers(2), "attention and MLP of each layer", "RMSNorm before and after each branch"),
    _case("GPT2", "language", lambda: _hf("GPT2LMHeadModel", "GPT2Config", {"input_ids": _tokens(4, 16)}, n_embd=64, n_layer=4, n_head=4, initializer_range=0.07, bos_token_id=1, eos_token_id=2, **WORDS), lambda m: 2 * m.config.n_layer, "attention and MLP of each layer", "LayerNorm before each branch"),
    _case("BERT", "language", lambda: _hf("BertModel", "BertConfig", {"input_ids": _tokens(4, 16)}, **SMALL, **WORDS), _layers(2), "attention and MLP of each layer", "LayerNorm after each addition"),
    _case("T5", "language", lambda: _hf("T5ForConditionalGeneration", "T5Config", {"input_ids": _tokens(4, 16), "decoder_input_ids": _tokens(4, 12)}, d_model=64, d_kv=16, d_ff=128, num_layers=3, num_heads=4, **WORDS), lambda m: 2 * m.config.num_layers + 3 * m.config.num_decoder_layers, "2 of each encoder layer, 3 of each decoder layer", "RMSNorm before each branch"),
    _case("OPT", "language", lambda: _hf("OPTForCausalLM", "OPTConfig", {"input_ids": _tokens(4, 16)}, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, ffn_dim=128, init_std=0.07, word_embed_proj_dim=64, **WORDS), _layers(2), "attention and MLP of each layer", "LayerNorm before each branch"),
    _case("ALBERT", "language", lambda: _hf("AlbertModel", "AlbertConfig", {"input_ids": _tokens(4, 16)}, **SMALL, **WORDS, embedding_size=32), _layers(2), "attention and MLP of each of the layers, which share their weights", "LayerNorm after each addition"),
    _case("Mamba", "state spaces", lambda: _hf("MambaModel", "MambaConfig", {"input_ids": _tokens(4, 16)}, hidden_size=64, num_hidden_layers=4, state_size=8, **WORDS), _layers(2), "one addition around each mixer, and the state space model's own skip D in it", "RMSNorm before each mixer"),
    _case("Mixtral", "language", lambda: _hf("MixtralForCausalLM", "MixtralConfig", {"input_ids": _tokens(4, 16)}, **SMALL, **WORDS, num_key_value_heads=2, num_local_experts=4), _layers(2), "attention and experts of each layer", "RMSNorm before each branch"),
]

PIXELS = {**SMALL, "image_size": 64}


def _images(size: int = 64, count: int = 4) -> torch.Tensor:
    return torch.randn(count, 3, size, size)


def _detr() -> Built:
    import transformers

    backbone = transformers.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32, 64, 128], depths=[2, 2, 2, 2], layer_type="basic", out_features=["stage4"])
    config = transformers.DetrConfig(use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=128, decoder_ffn_dim=128, num_queries=10)
    return transformers.DetrForObjectDetection(config), {"pixel_values": _images()}


VISION = [
    _case("ViT", "recognition", lambda: _hf("ViTModel", "ViTConfig", {"pixel_values": _images()}, **PIXELS), _layers(2), "attention and MLP of each layer", "LayerNorm before each branch"),
    _case("DETR", "detection", _detr, lambda m: 8 + 2 * m.config.encoder_layers + 3 * m.config.decoder_layers - 2, "8 basic blocks of the backbone; 2 of each encoder layer, 3 of each decoder layer but the first, whose queries begin as zeros", "frozen BatchNorm with fresh statistics is the identity, so the backbone's variance grows, by less than 2 a block"),
    _case("ResNet", "recognition", lambda: _hf("ResNetModel", "ResNetConfig", {"pixel_values": _images()}, embedding_size=16, hidden_sizes=[16, 32, 64, 128], depths=[2, 2, 2, 2], layer_type="bottleneck"), lambda m: sum(m.config.depths), "bottlenecks of the stages", "BatchNorm after each convolution"),
    _case("RegNet", "recognition", lambda: _hf("RegNetModel", "RegNetConfig", {"pixel_values": _images()}, embedding_size=16, hidden_sizes=[16, 32, 64, 128], depths=[1, 2, 2, 1], groups_width=8), lambda m: sum(m.config.depths), "blocks of the stages", "BatchNorm after each convolution"),
    _case("MobileNetV2", "recognition", lambda: _hf("MobileNetV2Model", "MobileNetV2Config", {"pixel_values": _images()}, depth_multiplier=0.5), lambda m: sum(layer.use_residual for layer in m.layer), "inverted residuals that keep the shape", "BatchNorm after each convolution"),
    _case("ConvNextV2", "recognition", lambda: _hf("ConvNextV2Model", "ConvNextV2Config", {"pixel_values": _images()}, hidden_sizes=[16, 32, 64, 128], depths=[2, 2, 2, 2], initializer_range=0.07), lambda m: sum(m.config.depths), "layers of the stages; GRN's inner addition is no block", "LayerNorm in each branch"),
    _case("CvT", "recognition", lambda: _hf("CvtModel", "CvtConfig", {"pixel_values": _images()}, embed_dim=[16, 32, 64], num_heads=[1, 2, 4], depth=[1, 2, 3], drop_path_rate=[0.0, 0.0, 0.0]), lambda m: 2 * sum(m.config.depth), "attention and MLP of each layer", "LayerNorm before each branch"),
    _case("Segformer", "segmentation", lambda: _hf("SegformerForSemanticSegmentation", "SegformerConfig", {"pixel_values": _images()}, hidden_sizes=[16, 32, 64, 128], decoder_hidden_size=32, depths=[1, 1, 1, 1], initializer_range=0.07), lambda m: 2 * sum(m.config.depths), "attention and MLP of each block", "LayerNorm before each branch"),
    _case("Swinv2", "recognition", lambda: _hf("Swinv2Model", "Swinv2Config", {"pixel_values": _images()}, image_size=64, patch_size=4, embed_dim=16, initializer_range=0.1, depths=[2, 2], num_heads=[2, 4], window_size=4), lambda m: 2 * sum(m.config.depths), "attention and MLP of each layer", "LayerNorm at the end of each branch"),
    _case("CLIP", "vision and language", lambda: _clip(), lambda m: 2 * (m.config.text_config.num_hidden_layers + m.config.vision_config.num_hidden_layers), "attention and MLP of each layer of both towers", "LayerNorm before each branch"),
    _case("DPT", "depth", lambda: _hf("DPTForDepthEstimation", "DPTConfig", {"pixel_values": _images()}, **SMALL, image_size=64, patch_size=16, backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[16, 32, 64, 64], fusion_hidden_size=256, is_hybrid=False), lambda m: 2 * m.config.num_hidden_layers + 2 * len(m.neck.fusion_stage.layers) - 1, "attention and MLP of each layer; two residual units a fusion layer, one in the first", "LayerNorm before each branch; the fusion's residual units have no norm, and are few", fusions=3),
]


def _clip() -> Built:
    import transformers

    text = {**SMALL, **WORDS, "max_position_embeddings": 16, "eos_token_id": 63, "bos_token_id": 0, "pad_token_id": 1}
    config = transformers.CLIPConfig(text_config=text, vision_config={**PIXELS, "patch_size": 16}, projection_dim=32)
    return transformers.CLIPModel(config), {"input_ids": _tokens(4, 12), "pixel_values": _images()}


WAVES = {**SMALL, "num_hidden_layers": 3, "conv_dim": (32, 32, 32), "conv_stride": (5, 4, 2), "conv_kernel": (10, 8, 4), "num_feat_extract_layers": 3, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "mask_time_prob": 0.0, "layerdrop": 0.0}

SPEECH = [
    _case("Wav2Vec2", "speech", lambda: _hf("Wav2Vec2Model", "Wav2Vec2Config", {"input_values": torch.randn(4, 4000)}, **WAVES), lambda m: 2 * m.config.num_hidden_layers + 1, "attention and MLP of each layer; the convolutional position embedding is added", "GroupNorm in the first layer, LayerNorm after each addition"),
    _case("HuBERT", "speech", lambda: _hf("HubertModel", "HubertConfig", {"input_values": torch.randn(4, 4000)}, **WAVES), lambda m: 2 * m.config.num_hidden_layers + 1, "attention and MLP of each layer; the convolutional position embedding is added", "GroupNorm in the first layer, LayerNorm after each addition"),
    _case("Whisper", "speech", lambda: _hf("WhisperModel", "WhisperConfig", {"input_features": torch.randn(4, 16, 64), "decoder_input_ids": _tokens(4, 8)}, vocab_size=64, num_mel_bins=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, d_model=64, encoder_ffn_dim=128, decoder_ffn_dim=128, max_source_positions=32, max_target_positions=16, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1), lambda m: 2 * m.config.encoder_layers + 3 * m.config.decoder_layers, "2 of each encoder layer, 3 of each decoder layer", "LayerNorm before each branch"),
    _case("Encodec", "audio codec", lambda: _hf("EncodecModel", "EncodecConfig", {"input_values": torch.randn(4, 1, 3200)}, num_filters=8, hidden_size=32, codebook_dim=32, upsampling_ratios=[4, 4, 2, 2]), lambda m: 2 * len(m.config.upsampling_ratios) + 2, "one residual unit a ratio in encoder and decoder; an addition around each LSTM; the quantizer's sums of code vectors are no branches", "weight norm alone, on a chain of ten strided layers: torch's initialisation loses a factor of 3 to 6 a layer", "sick"),
    _case("Dac", "audio codec", lambda: _hf("DacModel", "DacConfig", {"input_values": torch.randn(4, 1, 2048)}, encoder_hidden_size=8, downsampling_ratios=[2, 4, 4], decoder_hidden_size=64, n_codebooks=2, codebook_size=32, codebook_dim=4, hidden_size=64), lambda m: 3 * 2 * len(m.config.downsampling_ratios), "three residual units a ratio in encoder and decoder; the quantizer's sums and its straight-through estimator are no branches", "no norm: Snake activations and truncated normal weights of a small constant deviation", "sick"),
    _case("AST", "audio", lambda: _hf("ASTModel", "ASTConfig", {"input_values": torch.randn(4, 64, 32)}, **SMALL, max_length=64, num_mel_bins=32), _layers(2), "attention and MLP of each layer", "LayerNorm before each branch"),
]

TIME = [
    _case("PatchTST", "time series", lambda: _hf("PatchTSTForPrediction", "PatchTSTConfig", {"past_values": torch.randn(4, 64, 3)}, num_input_channels=3, context_length=64, patch_length=8, patch_stride=8, d_model=32, num_hidden_layers=3, num_attention_heads=4, ffn_dim=64, prediction_length=8), _layers(2), "attention and MLP of each layer", "BatchNorm around each branch"),
]


def _diffusers(name: str, batch: Any, **options: Any) -> Built:
    import diffusers

    return getattr(diffusers, name)(**options), batch


DIFFUSERS = [
    _case("UNet2DModel", "generation", lambda: _diffusers("UNet2DModel", {"sample": torch.randn(2, 3, 32, 32), "timestep": torch.tensor([3, 70])}, sample_size=32, block_out_channels=(32, 64), layers_per_block=1, down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"), norm_num_groups=8, attention_head_dim=16), lambda m: count(m, "ResnetBlock2D", "Attention"), "ResnetBlock2Ds and attentions; the time embedding is added to a branch and is no shortcut", "GroupNorm before each convolution", package="diffusers"),
    _case("UNet2DConditionModel", "generation", lambda: _diffusers("UNet2DConditionModel", {"sample": torch.randn(2, 4, 16, 16), "timestep": torch.tensor([3, 70]), "encoder_hidden_states": torch.randn(2, 5, 32)}, sample_size=16, block_out_channels=(32, 64), layers_per_block=1, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), norm_num_groups=8, attention_head_dim=4, cross_attention_dim=32), lambda m: count(m, "ResnetBlock2D") + count(m, "Transformer2DModel") + 3 * count(m, "BasicTransformerBlock"), "ResnetBlock2Ds; three of each transformer block and one around it", "GroupNorm and LayerNorm before each branch", package="diffusers"),
    _case("DiT", "generation", lambda: _diffusers("DiTTransformer2DModel", {"hidden_states": torch.randn(4, 4, 16, 16), "timestep": torch.tensor([3, 70, 500, 900]), "class_labels": torch.tensor([1, 2, 3, 4])}, num_attention_heads=4, attention_head_dim=16, num_layers=3, sample_size=16, num_embeds_ada_norm=1000, out_channels=4), lambda m: 2 * m.config.num_layers, "attention and MLP of each block", "LayerNorm before each branch", package="diffusers"),
    _case("AutoencoderKL", "generation", lambda: _diffusers("AutoencoderKL", torch.randn(2, 3, 32, 32), block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, norm_num_groups=8, latent_channels=4), lambda m: count(m, "ResnetBlock2D", "Attention"), "ResnetBlock2Ds and the attention in the middle of encoder and decoder", "GroupNorm before each convolution", package="diffusers"),
    _case("VQModel", "generation", lambda: _diffusers("VQModel", torch.randn(2, 3, 32, 32), block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, norm_num_groups=8, latent_channels=4, num_vq_embeddings=16), lambda m: count(m, "ResnetBlock2D", "Attention"), "ResnetBlock2Ds and the attention in the middle of encoder and decoder; the straight-through estimator is no branch", "GroupNorm before each convolution; an untrained codebook of 16 nearly equal vectors makes all inputs alike behind it", "sick", package="diffusers"),
]

CASES = [*LANGUAGE, *VISION, *SPEECH, *TIME, *DIFFUSERS]
