"""timm's normalizer-free networks: what a state dict is of, and its names for our tensors.

All of them are one class, so a state dict does not say which it is; its tensors do, but for the activation.

Source: timm's ``models/nfnet.py``, for names, constants and where it departs from the papers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from normfree.common.checks import invalid
from normfree.models import NFNet, NFRegNet

# Our modules in timm's names; blocks are numbered alike.
_OUTSIDE: dict[str, str] = {
    "stem.conv": "stem.conv",
    **{f"stem.conv{index}": f"stem.conv{index + 1}" for index in range(4)},
    "final.conv": "final_conv",
    "classifier": "head.fc",
}
_INSIDE: dict[str, str] = {
    "conv0": "conv1",
    "conv1": "conv2",
    "conv1b": "conv2b",
    "conv2": "conv3",
    "shortcut": "downsample.conv",
}
_GATE: dict[str, str] = {"squeeze_excite.linear0": "fc1", "squeeze_excite.linear1": "fc2"}
_SKIP_GAIN = "skipinit_gain"
_KINDS = {  # of widths, and where to read them
    "stem": r"stem\..+\.bias",
    "stages": r"stages\..+\.conv2\.bias",
    "branches": r"stages\..+\.conv0\.bias",
    "gates": r"stages\..+\.linear0\.bias",
    "head": r"final\.conv\.bias",
}
_STEMS = {"stem.conv4.weight": NFNet, "stem.conv.weight": NFRegNet}


@dataclass(frozen=True, kw_only=True)
class TimmStyle:
    """How timm built a network, as far as its state dict shows.

    Attributes:
        family: our class with the same graph.
        official: whether it is one of the ``dm_`` models, which have skip gains, gamma in the activations and
            TensorFlow's padding; the others have no skip gain, gamma in every convolution, the stem's and the
            head's too, and symmetric padding.
    """

    family: type[nn.Module]
    official: bool


def recognize(state_dict: Mapping[str, Tensor]) -> TimmStyle:
    """Return how timm built the network a state dict is of.

    Raises:
        ValueError: not one of timm's normalizer-free networks, or one that no definition here covers; the message
            says what differs.
    """
    stem = next((name for name in _STEMS if name in state_dict), None)
    if stem is None or "stages.0.0.conv1.gain" not in state_dict:
        remedy = "pass timm.create_model('dm_nfnet_f0', pretrained=True).state_dict(), for instance"
        raise ValueError(f"state_dict: is of no normalizer-free network of timm's; {remedy}")
    gates = [name for name in state_dict if ".attn" in name and name.endswith(".conv.weight")]
    if gates:
        _refuse(
            f"gates its branches with ECA ({gates[0]}: a convolution along the channels) where this definition has "
            "squeeze-excite"
        )
    if state_dict[stem].shape[-1] == 7:
        _refuse(
            "is an NF-ResNet whose shortcuts halve by a 2x2 average pool (avg_pool2d) before their 1x1 convolution, "
            "where the paper's and this definition's take every second pixel (stride 2); the arrays would fit, the "
            "function would not"
        )
    official = any(name.endswith(_SKIP_GAIN) for name in state_dict)
    return TimmStyle(family=_STEMS[stem], official=official)


def _refuse(difference: str) -> None:
    remedy = "take timm's own model, or weights of a dm_nfnet_f* or nfnet_f*"
    raise ValueError(f"state_dict: timm's network {difference}; {remedy}")


def timm_names(model: nn.Module, style: TimmStyle) -> dict[str, str]:
    """Return timm's name of each parameter of a model, by ours; a skip gain's only where timm has skip gains.

    Args:
        model: an ``NFNet`` or ``NFRegNet``.
        style: of the state dict.

    Raises:
        ValueError: the model has a parameter that neither family has.
    """
    gate = "attn_last" if style.family is NFNet else "attn"
    inside = {**_INSIDE, **{ours: f"{gate}.{theirs}" for ours, theirs in _GATE.items()}}
    names = {}
    for name, _ in model.named_parameters():
        module, _, leaf = name.rpartition(".")
        scope, table = "", _OUTSIDE
        if name.startswith("stages."):
            parts = module.split(".")
            scope, module, table = ".".join(parts[:3]) + ".", ".".join(parts[3:]), inside
        if leaf == "skip_gain":
            if style.official:
                names[name] = scope + _SKIP_GAIN
            continue
        if module not in table:
            raise invalid("model", name, "timm has no such parameter", "pass the model as create_model built it")
        names[name] = f"{scope}{table[module]}.{leaf}"
    return names


def check_sizes(model: nn.Module, names: Mapping[str, str], state_dict: Mapping[str, Tensor]) -> None:
    """Raise if timm's network has other widths than ours.

    Args:
        model: an ``NFNet`` or ``NFRegNet``.
        names: timm's names by ours.
        state_dict: with all of these names.

    Raises:
        ValueError: widths of the stem, the stages, the branches, the gates or the head differ; the message lists
            both, once per kind.
    """
    ours = dict(model.named_parameters())
    differences = []
    for kind, pattern in _KINDS.items():
        chosen = [name for name in names if re.fullmatch(pattern, name)]
        mine = [len(ours[name]) for name in chosen]
        theirs = [len(state_dict[names[name]]) for name in chosen]
        if mine != theirs:
            differences.append(f"{kind} of {_runs(theirs)} channels (ours {_runs(mine)})")
    if differences:
        why = "timm rounds every width to a multiple of 8" if isinstance(model, NFRegNet) else "timm chose them"
        raise ValueError(
            f"state_dict: timm's network has {', '.join(differences)}; {why}; pass widths, expansion and se_ratio "
            "to create_model where those give timm's sizes, or take timm's own model"
        )


def _runs(sizes: Sequence[int]) -> str:
    """Return sizes without immediate repetitions: ``[40, 40, 80]`` is "40 80"."""
    return " ".join(str(size) for index, size in enumerate(sizes) if index == 0 or sizes[index - 1] != size)
