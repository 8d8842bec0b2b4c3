"""The official (Haiku) name of each tensor of a model: a pure function of the model.

A name is ``<module path>/<name>``. Blocks are numbered over the whole network, without a suffix on the first;
what a block makes in its constructor is under ``<block>/~/``, what it makes while it runs under ``<block>/``.
BatchNorm keeps its running statistics apart, as two exponential moving averages.

Source: the authors' public definitions (deepmind-research, folder nfnets), for the names alone. There is no
official BN-RegNet: its names here are those its official sisters would give it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn

from normfree.common.checks import invalid
from normfree.models import (
    Backbone,
    BNRegNet,
    FixUpResNet,
    NFNet,
    NFRegNet,
    NFResNet,
    ResNet,
    ResNetV2,
    SkipInitResNet,
)
from normfree.nn import ScaledWSConv2d

# The network's module, its blocks' and, per block, the learnable factor of the branch; per family.
_FAMILIES: dict[type[Backbone], tuple[str, str, str]] = {
    NFResNet: ("NF_ResNet", "nf_res_block", "skip_gain"),
    NFRegNet: ("NF_RegNet", "nf_block", "skip_gain"),
    NFNet: ("NFNet", "nf_block", "skip_gain"),
    SkipInitResNet: ("SkipInit_ResNet", "nf_res_block", "skip_gain"),
    FixUpResNet: ("FixUp_ResNet", "res_block", "scale"),
    ResNet: ("ResNet", "res_block_v1", ""),
    ResNetV2: ("ResNet", "res_block_v2", ""),
    BNRegNet: ("BN_RegNet", "block", ""),
}

# Our modules outside the blocks, relative to the network.
_OUTSIDE: dict[str, str] = {
    "stem.conv": "~/initial_conv",
    "stem.norm": "~/initial_bn",
    **{f"stem.conv{index}": f"~/stem_conv{index}" for index in range(4)},
    "final.conv": "~/final_conv",
    "final.norm": "~/final_bn",
    "classifier": "~/linear",
}

# Our modules inside a block, relative to it.
_INSIDE: dict[str, str] = {
    **{name: f"~/{name}" for name in ("conv0", "conv1", "conv1b", "conv2")},
    **{f"conv{index}.conv": f"~/conv{index}" for index in range(3)},
    **{f"{norm}{index}{end}": f"~/bn{index}" for norm, end in (("pre", ".norm"), ("norm", "")) for index in range(3)},
    **{f"conv{index}.norm": f"~/bn{index}" for index in range(3)},
    "shortcut": "~/conv_shortcut",
    "shortcut.conv": "~/conv_shortcut",
    "shortcut.norm": "shortcut_bn",
    "squeeze_excite.linear0": "~/squeeze_excite/~/linear",
    "squeeze_excite.linear1": "~/squeeze_excite/~/linear_1",
}

# Scalars, which belong to the block or the network itself; relative to it, our name with its module's.
_SCALARS: dict[str, str] = {
    "bias0.bias": "bias1a",
    "bias1.bias": "bias1b",
    "bias2.bias": "bias2a",
    "bias3.bias": "bias2b",
    "bias4.bias": "bias3a",
    "bias5.bias": "bias3b",
    "stem.bias.bias": "bias1",
    "classifier_bias.bias": "bias2",
}

_NORMS = (nn.BatchNorm2d, nn.GroupNorm, nn.InstanceNorm2d)
_STATISTICS = {"running_mean": "~/mean_ema/average", "running_var": "~/var_ema/average"}
_COUNTER = {"num_batches_tracked": "~/mean_ema/counter"}
_WITHOUT_COUNTERPART = ("~/mean_ema/hidden", "~/var_ema/hidden", "~/var_ema/counter")


@dataclass(frozen=True, kw_only=True)
class HaikuNames:
    """Official names by our names.

    Attributes:
        parameters: of every parameter.
        statistics: of the running means and variances.
        counters: of the numbers of batches these have seen.
        without_counterpart: official state that follows from the rest.
    """

    parameters: dict[str, str]
    statistics: dict[str, str]
    counters: dict[str, str]
    without_counterpart: frozenset[str]


def haiku_names(model: nn.Module) -> HaikuNames:
    """Return the official name of each tensor of a model.

    Args:
        model: a model of ``create_model``.

    Raises:
        ValueError: the model is of none of our families, or has a tensor that none of them has.

    Source: as at the top of this file.
    """
    network, block, factor = _family(model)
    owners = dict(model.named_modules())
    blocks = [name for name in owners if re.fullmatch(r"stages\.\d+\.\d+", name)]
    scopes = {name: f"{network}/~/{block}" + (f"_{index}" if index else "") for index, name in enumerate(blocks)}

    def official(name: str) -> str:
        scope, path, local = network, _OUTSIDE, name
        parts = name.split(".")
        if parts[0] == "stages":
            scope, path, local = scopes[".".join(parts[:3])], _INSIDE, ".".join(parts[3:])
        if local in _SCALARS:
            return f"{scope}/{_SCALARS[local]}"
        module, _, leaf = local.rpartition(".")
        if leaf == "skip_gain":
            return f"{scope}/{factor}"
        owner = owners[name.rpartition(".")[0]]
        if module not in path or leaf not in _leaves(owner):
            raise invalid("model", name, f"{network} has no such tensor", "pass the model as create_model built it")
        return f"{scope}/{path[module]}/{_leaves(owner)[leaf]}"

    buffers = [name for name, _ in model.named_buffers()]
    norms = {official(name).removesuffix(_STATISTICS["running_mean"]) for name in buffers if "running_mean" in name}
    return HaikuNames(
        parameters={name: official(name) for name, _ in model.named_parameters()},
        statistics={name: official(name) for name in buffers if name.rpartition(".")[2] in _STATISTICS},
        counters={name: official(name) for name in buffers if name.rpartition(".")[2] in _COUNTER},
        without_counterpart=frozenset(norm + end for norm in norms for end in _WITHOUT_COUNTERPART),
    )


def _family(model: nn.Module) -> tuple[str, str, str]:
    for kind in type(model).__mro__:
        if kind in _FAMILIES:
            return _FAMILIES[kind]
    families = ", ".join(family.__name__ for family in _FAMILIES)
    raise invalid("model", type(model).__name__, "has no official counterpart", f"pass one of {families}, unwrapped")


def _leaves(owner: nn.Module) -> dict[str, str]:
    """Return the official names of a module's own tensors."""
    if isinstance(owner, _NORMS):
        return {"weight": "scale", "bias": "offset", **_STATISTICS, **_COUNTER}
    if isinstance(owner, ScaledWSConv2d):
        return {"weight": "w", "bias": "bias", "gain": "gain"}
    return {"weight": "w", "bias": "b"}
