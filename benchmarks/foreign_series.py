"""Architectures for sequences of the smaller libraries: time series, sound, language."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.foreign_case import Built, Case, count, load


def _tsai(module: str, name: str, *arguments: Any, **options: Any) -> Built:
    return (load(f"tsai.models.{module}", name)(*arguments, **options), torch.randn(8, 3, 64))


SERIES = [
    Case(
        name="tsai:InceptionTime",
        package="tsai",
        field="time series",
        build=lambda: _tsai("InceptionTime", "InceptionTime", 3, 4),
        blocks=lambda m: len(m.inceptionblock.shortcut),
        counted="one shortcut every third module",
        because="BatchNorm after each convolution",
    ),
    Case(
        name="tsai:ResNet",
        package="tsai",
        field="time series",
        build=lambda: _tsai("ResNet", "ResNet", 3, 4),
        blocks=lambda m: count(m, "ResBlock"),
        counted="ResBlocks",
        because="BatchNorm after each convolution",
    ),
    Case(
        name="tsai:TCN",
        package="tsai",
        field="time series",
        build=lambda: _tsai("TCN", "TCN", 3, 4, layers=[16] * 5),
        blocks=lambda m: count(m, "TemporalBlock"),
        counted="temporal blocks",
        because="weight norm with weights of a deviation of 0.01, and a shortcut around each block",
    ),
    Case(
        name="tsai:XceptionTime",
        package="tsai",
        field="time series",
        build=lambda: _tsai("XceptionTime", "XceptionTime", 3, 4),
        blocks=lambda m: len(m.block.shortcut),
        counted="one shortcut every second module",
        because="BatchNorm after each block",
    ),
    Case(
        name="tsai:LSTM_FCN",
        package="tsai",
        field="time series",
        build=lambda: _tsai("RNN_FCN", "LSTM_FCN", 3, 4, seq_len=64),
        blocks=0,
        counted="two branches are concatenated",
        because="BatchNorm after each convolution",
    ),
    Case(
        name="tsai:TSTPlus",
        package="tsai",
        field="time series",
        build=lambda: _tsai("TSTPlus", "TSTPlus", 3, 4, 64, n_layers=3, d_model=32, n_heads=4, d_ff=64),
        blocks=lambda m: 2 * 3,
        counted="attention and MLP of each layer",
        because="BatchNorm after each addition",
    ),
    Case(
        name="tsai:OmniScaleCNN",
        package="tsai",
        field="time series",
        build=lambda: _tsai("OmniScaleCNN", "OmniScaleCNN", 3, 4, 64, layers=[8 * 16, 5 * 16 * 4, 16 * 16]),
        blocks=0,
        counted="convolutions of many sizes are concatenated",
        because="BatchNorm after each convolution",
    ),
    Case(
        name="pytorch-tcn:TCN",
        package="pytorch-tcn",
        field="time series",
        build=lambda: (
            load("pytorch_tcn", "TCN")(3, [16] * 5, use_norm="batch_norm", causal=True),
            torch.randn(8, 3, 64),
        ),
        blocks=lambda m: len(m.network),
        counted="temporal blocks",
        because="BatchNorm after each convolution",
    ),
]


SOUND = [
    Case(
        name="asteroid:TDConvNet",
        package="asteroid",
        field="speech separation",
        build=lambda: (
            load("asteroid.masknn", "TDConvNet")(32, 2, n_blocks=4, n_repeats=2, bn_chan=32, hid_chan=64, skip_chan=32),
            torch.randn(4, 32, 100),
        ),
        blocks=lambda m: 8,
        counted="one addition a block to the stream; those to the sum of skip outputs are fusions",
        because="a norm after each convolution but the last of a branch",
        fusions=7,
    ),
    Case(
        name="asteroid:DPRNN",
        package="asteroid",
        field="speech separation",
        build=lambda: (
            load("asteroid.masknn", "DPRNN")(32, 2, bn_chan=32, hid_size=32, chunk_size=20, n_repeats=3),
            torch.randn(4, 32, 100),
        ),
        blocks=lambda m: 6,
        counted="two of each of three dual-path blocks",
        because="a norm at the end of each branch",
    ),
    Case(
        name="asteroid:ConvTasNet",
        package="asteroid",
        field="speech separation",
        build=lambda: (
            load("asteroid.models", "ConvTasNet")(
                2, n_filters=32, n_blocks=4, n_repeats=2, bn_chan=32, hid_chan=64, skip_chan=32
            ),
            torch.randn(4, 1600),
        ),
        blocks=lambda m: 8,
        counted="one addition a block to the stream; those to the sum of skip outputs are fusions",
        because="a norm after each convolution but the last of a branch",
        fusions=7,
    ),
    Case(
        name="demucs:Demucs",
        package="demucs",
        field="music separation",
        build=lambda: (
            load("demucs.demucs", "Demucs")(sources=["a", "b"], channels=8, depth=4, norm_starts=2, resample=False),
            torch.randn(2, 2, 8192),
        ),
        blocks=lambda m: sum(len(d.layers) for d in m.modules() if type(d).__name__ == "DConv"),
        counted="dilated branches of the encoder; the decoder's additions of encoder maps are fusions",
        because="branches have GroupNorm and a layer scale of 1e-4; the outer layers have none, and rescaled weights",
        fusions=4,
    ),
    Case(
        name="conformer:Conformer",
        package="conformer",
        field="speech",
        build=lambda: (load("conformer", "Conformer")(64, depth=3, dim_head=16, heads=4), torch.randn(4, 32, 64)),
        blocks=12,
        counted="two half MLPs, attention and convolution of each of three blocks",
        because="LayerNorm before each branch",
    ),
]


LANGUAGE = [
    Case(
        name="fastai:AWD_LSTM",
        package="fastai",
        field="language",
        build=lambda: (load("fastai.text.models.awdlstm", "AWD_LSTM")(64, 32, 64, 2), torch.randint(0, 64, (4, 12))),
        blocks=0,
        counted="two LSTMs in a chain",
        because="gates bound the state",
    ),
    Case(
        name="x-transformers:decoder",
        package="x-transformers",
        field="language",
        build=lambda: (
            load("x_transformers", "TransformerWrapper")(
                num_tokens=64,
                max_seq_len=32,
                attn_layers=load("x_transformers", "Decoder")(
                    dim=64, depth=4, heads=4, use_rmsnorm=True, ff_glu=True, rotary_pos_emb=True
                ),
            ),
            torch.randint(0, 64, (4, 16)),
        ),
        blocks=8,
        counted="attention and MLP of each of four layers",
        because="RMSNorm before each branch",
    ),
    Case(
        name="x-transformers:sandwich",
        package="x-transformers",
        field="language",
        build=lambda: (
            load("x_transformers", "TransformerWrapper")(
                num_tokens=64,
                max_seq_len=32,
                attn_layers=load("x_transformers", "Encoder")(
                    dim=64, depth=4, heads=4, sandwich_norm=True, use_scalenorm=True
                ),
            ),
            torch.randint(0, 64, (4, 16)),
        ),
        blocks=8,
        counted="attention and MLP of each of four layers",
        because="norms before and after each branch",
    ),
]


CASES = [*SERIES, *SOUND, *LANGUAGE]
