"""Architectures for tables, graphs, flows, physics and control."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from benchmarks.foreign_case import Built, Case, count, load


def _table(count: int = 64, categories: int = 3, numbers: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    return (torch.randint(0, 5, (count, categories)), torch.randn(count, numbers))


def _fastai_tabular() -> Built:
    return (load("fastai.tabular.model", "TabularModel")([(6, 4)] * 3, 6, 3, [64, 64, 64, 32]), _table())


TABLES = [
    Case(
        name="fastai:TabularModel",
        package="fastai",
        field="tables",
        build=_fastai_tabular,
        blocks=0,
        counted="a chain of Linear, ReLU and BatchNorm",
        because="BatchNorm after each activation",
    ),
    Case(
        name="tabnet:TabNet",
        package="pytorch-tabnet",
        field="tables",
        build=lambda: (
            load("pytorch_tabnet.tab_network", "TabNet")(
                8, 3, n_d=16, n_a=16, n_steps=3, group_attention_matrix=torch.eye(8)
            ),
            torch.randn(256, 8),
        ),
        blocks=lambda m: sum(
            len(block.glu_layers) - block.first for block in m.modules() if type(block).__name__ == "GLU_Block"
        ),
        counted="each gated layer of a feature transformer but the first adds its input, scaled by √½",
        because="ghost BatchNorm after each layer",
    ),
    Case(
        name="rtdl:MLP",
        package="rtdl-revisiting-models",
        field="tables",
        build=lambda: (
            load("rtdl_revisiting_models", "MLP")(d_in=8, d_out=3, n_blocks=6, d_block=64, dropout=0.1),
            torch.randn(64, 8),
        ),
        blocks=0,
        counted="a chain of Linear, ReLU, Dropout",
        because="torch's initialisation, without any normalizer: variance falls by about six a layer",
        verdict="sick",
    ),
    Case(
        name="rtdl:ResNet",
        package="rtdl-revisiting-models",
        field="tables",
        build=lambda: (
            load("rtdl_revisiting_models", "ResNet")(
                d_in=8, d_out=3, n_blocks=4, d_block=64, d_hidden_multiplier=2.0, dropout1=0.1, dropout2=0.0
            ),
            torch.randn(64, 8),
        ),
        blocks=4,
        counted="blocks",
        because="BatchNorm before each branch",
    ),
    Case(
        name="rtdl:FTTransformer",
        package="rtdl-revisiting-models",
        field="tables",
        build=lambda: (
            load("rtdl_revisiting_models", "FTTransformer")(
                n_cont_features=6,
                cat_cardinalities=[5, 5, 5],
                d_out=3,
                n_blocks=3,
                d_block=32,
                attention_n_heads=4,
                attention_dropout=0.1,
                ffn_d_hidden_multiplier=2.0,
                ffn_dropout=0.1,
                residual_dropout=0.0,
            ),
            tuple(reversed(_table())),
        ),
        blocks=6,
        counted="attention and MLP of each of three blocks",
        because="LayerNorm before each branch",
    ),
    Case(
        name="tab-transformer:FTTransformer",
        package="tab-transformer-pytorch",
        field="tables",
        build=lambda: (
            load("tab_transformer_pytorch", "FTTransformer")(
                categories=(5, 5, 5), num_continuous=6, dim=32, dim_out=3, depth=3, heads=4
            ),
            _table(),
        ),
        blocks=6,
        counted="attention and MLP of each of three layers",
        because="LayerNorm before each branch",
    ),
    Case(
        name="tabm:TabM",
        package="tabm",
        field="tables",
        build=lambda: (
            load("tabm", "TabM").make(
                n_num_features=6, cat_cardinalities=[5, 5, 5], d_out=3, k=4, n_blocks=3, d_block=64
            ),
            tuple(reversed(_table())),
        ),
        blocks=0,
        counted="an ensemble of chains of Linear and ReLU",
        because="three layers deep, no normalizer needed",
    ),
]


def _graph(nodes: int = 64, edges: int = 256, width: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    return (torch.randn(nodes, width), torch.randint(0, nodes, (2, edges)))


def _gnn(kind: str, **options: Any) -> Built:
    return (load("torch_geometric.nn", kind)(8, 32, 8, 3, norm="batch_norm", **options), _graph())


def _deep_gcn() -> Built:
    layer, conv = (load("torch_geometric.nn", "DeepGCNLayer"), load("torch_geometric.nn", "GENConv"))

    class DeeperGCN(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Linear(8, 32)
            self.layers = nn.ModuleList(
                layer(
                    conv(32, 32, aggr="softmax", t=1.0, num_layers=2, norm="layer"),
                    nn.LayerNorm(32),
                    nn.ReLU(),
                    block="res+",
                )
                for _ in range(6)
            )
            self.head = nn.Linear(32, 3)

        def forward(self, x: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
            x = self.encoder(x)
            for each in self.layers:
                x = each(x, edges)
            return self.head(x)

    return (DeeperGCN(), _graph())


GRAPHS = [
    Case(
        name="pyg:GCN",
        package="torch-geometric",
        field="graphs",
        build=lambda: _gnn("GCN"),
        blocks=0,
        counted="message passing in a chain",
        because="BatchNorm after each aggregation",
    ),
    Case(
        name="pyg:GIN",
        package="torch-geometric",
        field="graphs",
        build=lambda: _gnn("GIN"),
        blocks=0,
        counted="a node's own features are added to its neighbours' inside the aggregation, not around weights",
        because="BatchNorm after each layer",
    ),
    Case(
        name="pyg:GAT",
        package="torch-geometric",
        field="graphs",
        build=lambda: _gnn("GAT", heads=2),
        blocks=0,
        counted="message passing in a chain",
        because="BatchNorm after each aggregation",
    ),
    Case(
        name="pyg:GraphSAGE",
        package="torch-geometric",
        field="graphs",
        build=lambda: _gnn("GraphSAGE"),
        blocks=0,
        counted="a node's own features pass a layer of their own and are added, which is no shortcut",
        because="BatchNorm after each aggregation",
    ),
    Case(
        name="pyg:PNA",
        package="torch-geometric",
        field="graphs",
        build=lambda: _gnn(
            "PNA",
            aggregators=["mean", "max", "std"],
            scalers=["identity", "amplification"],
            deg=torch.tensor([0, 8, 16, 24, 16]),
        ),
        blocks=0,
        counted="message passing in a chain",
        because="BatchNorm after each aggregation",
    ),
    Case(
        name="pyg:DeeperGCN",
        package="torch-geometric",
        field="graphs",
        build=_deep_gcn,
        blocks=lambda m: len(m.layers),
        counted="one addition around each layer; GENConv adds a node to its neighbours without any weight between",
        because="LayerNorm before each branch",
    ),
    Case(
        name="pyg:GraphUNet",
        package="torch-geometric",
        field="graphs",
        build=lambda: (load("torch_geometric.nn", "GraphUNet")(8, 16, 8, 3), _graph()),
        blocks=0,
        counted="levels are added (fusions)",
        because="no normalization, four layers deep",
    ),
]


def _nflow() -> Built:
    flow = load("nflows.flows.realnvp", "SimpleRealNVP")(8, 32, 4, 2, batch_norm_within_layers=True)
    return (flow._transform, torch.randn(32, 8))


def _realnvp() -> Built:
    import normflows as nf

    flows = []
    for _ in range(4):
        flows += [
            nf.flows.AffineCouplingBlock(nf.nets.MLP([4, 32, 32, 8], init_zeros=True)),
            nf.flows.Permute(8, mode="swap"),
            nf.flows.ActNorm(8),
        ]
    return (nf.NormalizingFlow(nf.distributions.DiagGaussian(8), flows), torch.randn(32, 8))


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

    return (Chain(), torch.randn(8, 4, 16, 16))


FLOWS = [
    Case(
        name="nflows:RealNVP",
        package="nflows",
        field="flows",
        build=lambda: _nflow(),
        blocks=lambda m: count(m, "ResidualBlock"),
        counted="residual blocks of each coupling's network",
        because="BatchNorm before each convolution of a block, and last weights of 0.001",
    ),
    Case(
        name="normflows:RealNVP",
        package="normflows",
        field="flows",
        build=lambda: _realnvp(),
        blocks=0,
        counted="couplings in a chain",
        because="zero-initialised last layers make each coupling the identity",
    ),
    Case(
        name="normflows:Glow",
        package="normflows",
        field="flows",
        build=lambda: _glow(),
        blocks=0,
        counted="couplings in a chain",
        because="zero-initialised last layers make each coupling the identity",
    ),
]


def _smooth(examples: int, channels: int, size: int) -> torch.Tensor:
    """Random fields of unit variance and few frequencies, as solutions of equations are."""
    coarse = torch.randn(examples, channels, 5, 5)
    fields = nn.functional.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=True)
    return fields / fields.std()


PHYSICS = [
    Case(
        name="neuralop:FNO",
        package="neuraloperator",
        field="physics",
        build=lambda: (
            load("neuralop.models", "FNO")(
                n_modes=(8, 8), in_channels=1, out_channels=1, hidden_channels=16, n_layers=4
            ),
            _smooth(4, 1, 32),
        ),
        blocks=lambda m: 2 * 4,
        counted="the spectral path and the channel MLP of each layer are added to a shortcut",
        because="no normalizer",
    ),
    Case(
        name="e3nn:FullyConnectedNet",
        package="e3nn",
        field="molecules",
        build=lambda: _e3nn(),
        blocks=0,
        counted="a chain of linear layers",
        because="weights of unit variance scaled by 1/√fan-in",
    ),
]


def _e3nn() -> Built:
    return (load("e3nn.nn", "FullyConnectedNet")([16, 64, 64, 64, 8], torch.nn.functional.silu), torch.randn(64, 16))


def _policy(kind: str) -> Built:
    import gymnasium

    pixels = gymnasium.spaces.Box(0, 255, (3, 64, 64), dtype="uint8")
    vector = gymnasium.spaces.Box(-1.0, 1.0, (8,))
    policy = load("stable_baselines3.common.policies", kind)
    images = "Cnn" in kind
    model = policy(pixels if images else vector, gymnasium.spaces.Discrete(4), lambda _: 0.001)
    return (model, torch.randint(0, 255, (8, 3, 64, 64)).float() if images else torch.randn(64, 8))


CONTROL = [
    Case(
        name="stable-baselines3:ActorCriticCnnPolicy",
        package="stable-baselines3",
        field="control",
        build=lambda: _policy("ActorCriticCnnPolicy"),
        blocks=0,
        counted="three convolutions and two heads",
        because="orthogonal weights with the gain of ReLU; the policy's head is scaled by 0.01",
    ),
    Case(
        name="stable-baselines3:ActorCriticPolicy",
        package="stable-baselines3",
        field="control",
        build=lambda: _policy("ActorCriticPolicy"),
        blocks=0,
        counted="two layers for each of policy and value",
        because="orthogonal weights; the policy's head is scaled by 0.01",
    ),
]


CASES = [*TABLES, *GRAPHS, *FLOWS, *PHYSICS, *CONTROL]
