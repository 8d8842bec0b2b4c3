"""What a model is made of, as far as a remedy must know: found in the recorded dataflow of one forward pass.

A remedy has to work on the model in hand. Whether conversion has something to standardize there is told by what was
recorded: it leaves alone what runs on its own output (recurrent cells), what stands beside attention, filters of a few
weights, weights that are computed from others, and layers that nothing follows. The rule here errs to the side
of "no": a model that could be converted may get lines that set its weights instead, which work on it, too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from normfree.signal.moments import Sizes
from normfree.trace import operations as op
from normfree.trace.graph import Node

FEWEST_WEIGHTS = 9
"""Weights of one output of a layer that conversion standardizes at least."""

FEWEST_IN_A_ROW = 3
"""Layers it has left alone that make a signal explode or fade by themselves."""

_SATURATING = {"sigmoid", "hardsigmoid", "tanh", "hardtanh", "relu6"}
_TITLES = {
    "relu": "ReLU",
    "relu6": "ReLU6",
    "leaky_relu": "LeakyReLU",
    "_prelu_kernel": "PReLU",
    "prelu": "PReLU",
    "elu": "ELU",
    "celu": "CELU",
    "selu": "SELU",
    "gelu": "GELU",
    "silu": "SiLU",
    "mish": "Mish",
    "hardswish": "Hardswish",
    "softplus": "Softplus",
    "sigmoid": "sigmoid",
    "hardsigmoid": "hard sigmoid",
    "tanh": "tanh",
    "hardtanh": "hard tanh",
}


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What a model is made of.

    Attributes:
        residual: number of its residual additions.
        recurrent: a layer runs on what came of its own output.
        gated: names of the weights of gated cells (LSTM, GRU).
        own_output: names of the weights of other layers that run on what came of their own output.
        attention: it has attention.
        periodic: it has a sine or a cosine between layers.
        computed: some of its weights are computed by parametrizations (weight norm, spectral norm).
        convertible: conversion has layers to standardize.
        activations: names of the activation functions of its signal, in alphabetical order; those of gates are none.
        saturating: those of them that are bounded.
        weights: names of the weights of layers that another layer follows, outside residual branches.
        branches: names of the weights inside residual branches.
        ends: names of the last weight of each residual branch.
        others: names of all its other weights.
        standardized: the classes of layers with standardized weights that take the place of those it has.
        softmax: its output is a softmax.
        last_activation: what bends its one output last, behind all layers; "" where nothing does.
        last_module: name of the module of torch's that does nothing else, and runs once; "" where there is none.
        inputs: of each layer that reads an input as it is, its name, and how large the channels are.
    """

    residual: int = 0
    recurrent: bool = False
    gated: tuple[str, ...] = ()
    own_output: tuple[str, ...] = ()
    attention: bool = False
    periodic: bool = False
    computed: bool = False
    convertible: bool = True
    activations: tuple[str, ...] = ()
    saturating: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()
    branches: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    standardized: tuple[str, ...] = ()
    softmax: bool = False
    last_activation: str = ""
    last_module: str = ""
    inputs: tuple[tuple[str, Sizes], ...] = ()


class Weights:
    """The weights of a model, by where their memory begins."""

    def __init__(self, model: nn.Module) -> None:
        named = {name: p for name, p in model.named_parameters() if p.dim() > 1 and p.layout == torch.strided}
        self.names = list(named)
        self.at = {parameter.data_ptr(): name for name, parameter in named.items()}
        self.within = {parameter.untyped_storage().data_ptr(): name for name, parameter in named.items()}

    def is_parameter(self, tensor: Tensor) -> bool:
        """Tell whether a tensor is one of these weights, or a view of one."""
        return bool(self.among((tensor,)))

    def among(self, tensors: Iterable[Tensor]) -> list[str]:
        """The names of those weights that tensors are, or are views of, in their order."""
        found = []
        for tensor in tensors:
            if tensor.layout == torch.strided and tensor.dim() > 0:
                name = self.at.get(tensor.data_ptr()) or self.within.get(tensor.untyped_storage().data_ptr())
                if name is not None:
                    found.append(name)
        return found


@dataclass(frozen=True)
class Layer:
    """A weighted operation that ran.

    Attributes:
        node: what it gave.
        weights: names of its weights; none of those that are computed.
        fan_in: weights of one output, None where that is not known.
        is_zero: its weight starts at zero.
        looked_up: it is a table that rows are taken of.
    """

    node: Node
    weights: tuple[str, ...]
    fan_in: int | None
    is_zero: bool
    looked_up: bool


@dataclass(frozen=True)
class Seen:
    """What a recording has of a model.

    Attributes:
        layers: the weighted operations, in the order in which they ran.
        branches: of each residual addition the branch, and what it shares with the shortcut.
        nodes: all activations, in the order in which they were made.
        carried: those of them whose values go on to an output.
        attends: it has attention.
        operations: how often each operation on activations ran, by name.
    """

    layers: Sequence[Layer]
    branches: Sequence[tuple[Node, Node]]
    nodes: Sequence[Node]
    carried: Collection[Node]
    attends: bool
    operations: Mapping[str, int]


def architecture_of(model: nn.Module, weights: Weights, seen: Seen) -> Architecture:
    """What a model is made of.

    Args:
        model: the model.
        weights: its weights.
        seen: what was recorded of one forward pass.
    """
    made = {node.note.operation for node in seen.nodes if node in seen.carried}
    names = made & op.ACTIVATION & _TITLES.keys()
    cells = _weights_in(model, (nn.RNNBase, nn.RNNCellBase))
    gated = _weights_in(model, (nn.LSTM, nn.GRU, nn.LSTMCell, nn.GRUCell))
    own_output = _on_their_own_output(seen.layers)
    recurrent = bool(cells | own_output) or not op.RECURRENT.isdisjoint(seen.operations.keys())
    periodic = not made.isdisjoint(("sin", "cos"))
    computed = any(parametrize.is_parametrized(m, "weight") or hasattr(m, "weight_g") for m in model.modules())
    followed = ancestors(layer.node for layer in seen.layers)
    hidden = [layer for layer in seen.layers if layer.node in followed]
    able = [each for each in hidden if _can_be_standardized(each)]
    inside = _inside(seen.branches)
    residual = len(seen.branches)
    norms = sum(count for name, count in seen.operations.items() if name in op.NORM)
    if seen.attends:  # layers beside attention stay: then norms must hold the variance of all branches
        removed = any("batch_norm" in name or "group_norm" in name for name in seen.operations)
        convertible = removed and norms >= residual
    else:
        reachable = norms or not residual or any(layer.node in inside for layer in able)
        left = sum(not each.is_zero and not each.looked_up for each in hidden) - len(able)
        convertible = bool(reachable) and (bool(norms) or left < FEWEST_IN_A_ROW)
    convertible = convertible and bool(able) and not (recurrent or periodic)
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        convertible = False
    by_node = {layer.node: layer.weights for layer in seen.layers}
    last = {name for branch, _ in seen.branches for name in _last_weight(branch, by_node)}
    tables = {name for layer in seen.layers if layer.looked_up for name in layer.weights}
    branches = {name for layer in seen.layers if layer.node in inside for name in layer.weights} | last
    chain = {name for layer in hidden for name in layer.weights} - branches - tables
    return Architecture(
        residual=residual,
        recurrent=recurrent,
        gated=tuple(sorted(gated)),
        own_output=tuple(sorted(own_output | cells - gated)),
        attention=seen.attends,
        periodic=periodic,
        computed=computed,
        convertible=convertible,
        activations=tuple(sorted(_TITLES[name] for name in names)),
        saturating=tuple(sorted(_TITLES[name] for name in names & _SATURATING)),
        weights=tuple(sorted(chain)),
        branches=tuple(sorted(branches)),
        ends=tuple(sorted(last)),
        others=tuple(sorted(set(weights.names) - branches - chain)),
        standardized=_standardized(model, chain | branches),
    )


def title_of(operation: str) -> str:
    """An activation's name as people know it."""
    return _TITLES.get(operation, op.plain_name(operation))


_LAYERS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Linear,
)


def _standardized(model: nn.Module, names: Collection[str]) -> tuple[str, ...]:
    """The classes of layers with standardized weights for the layers that some weights are of, of whatever subclass."""
    modules = dict(model.named_modules())  # scripted modules have no get_submodule
    owners = [modules[name.rpartition(".")[0]] for name in names]
    return tuple(f"ScaledWS{kind.__name__}" for kind in _LAYERS if any(isinstance(owner, kind) for owner in owners))


def _can_be_standardized(layer: Layer) -> bool:
    few = layer.fan_in is None or layer.fan_in < FEWEST_WEIGHTS
    return bool(layer.weights) and not (few or layer.is_zero or layer.looked_up)


def _weights_in(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> set[str]:
    """The names of the weights of all modules of some kinds."""
    found = set[str]()
    for name, module in model.named_modules():
        if isinstance(module, kinds):
            found |= {f"{name}.{each}" if name else each for each, p in module.named_parameters() if p.dim() > 1}
    return found


def _on_their_own_output(layers: Sequence[Layer]) -> set[str]:
    """The names of the weights of layers that run several times, and read what came of their own output."""
    runs: dict[tuple[str, ...], list[Node]] = {}
    for layer in layers:
        if layer.weights and not layer.looked_up:
            runs.setdefault(layer.weights, []).append(layer.node)
    found = set[str]()
    for names, nodes in runs.items():
        if len(nodes) > 1 and not ancestors(nodes[-1:]).isdisjoint(nodes[:-1]):
            found |= set(names)
    return found


def _inside(branches: Sequence[tuple[Node, Node]]) -> set[Node]:
    """All activations between what a branch and its shortcut share, and the branch's end."""
    found = set[Node]()
    for branch, ancestor in branches:
        waiting = [branch]
        while waiting:
            node = waiting.pop()
            if node not in found and node.note.order > ancestor.note.order:
                found.add(node)
                waiting += node.parents
    return found


def _last_weight(branch: Node, weights: Mapping[Node, Sequence[str]]) -> Sequence[str]:
    """The name of the last weight before the end of a branch."""
    waiting, seen = [branch], {branch}
    while waiting:
        node = max(waiting, key=lambda each: each.note.order)
        waiting.remove(node)
        if weights.get(node):
            return weights[node][-1:]
        if not node.step.weighted:
            new = [parent for parent in node.parents if parent not in seen]
            seen.update(new)
            waiting += new
    return ()


def ancestors(nodes: Iterable[Node]) -> set[Node]:
    """All that some activations were computed from, themselves not included unless another was computed from them."""
    seen, waiting = set[Node](), list(nodes)
    while waiting:
        for parent in waiting.pop().parents:
            if parent not in seen:
                seen.add(parent)
                waiting.append(parent)
    return seen
