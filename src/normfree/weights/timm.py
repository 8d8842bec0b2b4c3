"""Weights of timm's normalizer-free networks into our models.

timm's convolution is ``g * c / sqrt(N) * (W - mean) / sqrt(var + 1e-5)``, ours
``g * c * (W - mean) / sqrt(max(N * var, 1e-4))``, with c the constants of its input. Both are linear in g, one
number per filter, so g takes up the difference exactly, and that between the places of gamma too.

N       fan-in of a filter
var     biased variance of its weights
g       its gain
gamma   1 / sqrt(Var[act(z)]); timm's values are the official ones
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from normfree.common.checks import invalid
from normfree.models import Backbone, NFNet, NFRegNet
from normfree.models.registry import check_backbone
from normfree.models.scaffold import NFBackbone
from normfree.nn import ACTIVATIONS, OFFICIAL_GAMMA, VARIANCE_FLOOR, PaddedConv2d
from normfree.weights.checkpoint import check_names, check_shapes, copy_in, without_wrappers

Model = TypeVar("Model", bound=nn.Module)

TIMM_EPS = 1e-5  # of the variance, in timm's normalizer-free networks
TIMM_ALPHA = 0.2

# The exact GELU has the constant of the authors' in timm, too, which a name of our own has not.
_ACTIVATION_NAMES = {type(factory()): name for name, factory in ACTIVATIONS.items() if name in OFFICIAL_GAMMA}
_LIKE_NO_OTHER = ("stem.conv.", "stem.conv0.", "final.conv.")  # their input is no activation


def load_timm_weights(model: Model, state_dict: Mapping[str, Tensor]) -> Model:
    """Copy a state dict of timm's into a model so that its logits are those of timm's model.

    ========================  =========================  ====================================================
    timm                      here                       logits (in evaluation mode) agree to rounding with
    ========================  =========================  ====================================================
    ``dm_nfnet_f<k>``         ``nfnet_f<k>``             ``padding="same"``, ``activation="gelu_exact"``
    ``nfnet_f<k>``            ``nfnet_f<k>``             ``activation="gelu_exact"``
    ``nf_regnet_*``           ``nf_regnet_b<k>``         sizes that timm's rounding to multiples of 8 leaves
    ``nf_*resnet*``           none: other shortcuts
    ``eca_*``                 none: another gate
    ``nfnet_l0``              none: a head of 1.5 times the last stage, where the paper has 2
    ========================  =========================  ====================================================

    timm's GELU is exact, the authors' (and the default here) its tanh approximation, which the ``dm_`` weights were
    trained with; between the two, logits differ by 1e-4 to 4e-4. A state dict does not say its activation: the
    model has to have timm's. What timm folds into the standardization (gamma, its eps) is
    taken up by the gains and the classifier's weight; a network without skip gains gets gains of 1.

    Args:
        model: an ``NFNet`` or ``NFRegNet`` of ``create_model``, with the state dict's num_classes and in_channels.
        state_dict: of a ``timm.create_model(...)``, also compiled or data-parallel (``_orig_mod.``, ``module.``); ours
            keeps no reference to it.

    Returns:
        The model; it is left as it was when anything is wrong.

    Raises:
        ValueError: not a model or a state dict of these; a network whose function differs, with what differs;
            the padding, alpha or activation is not timm's; tensors missing, left over or of another shape.

    Source: timm's ``models/nfnet.py`` and ``layers/std_conv.py``, for the formulas.
    """
    network = check_backbone(model, "pass an nfnet_f* or nf_regnet_b*")
    if not isinstance(state_dict, Mapping) or not all(isinstance(value, Tensor) for value in state_dict.values()):
        raise invalid("state_dict", type(state_dict).__name__, "must map names to tensors", "pass model.state_dict()")
    state_dict = without_wrappers(state_dict)
    style = recognize(state_dict)
    _check_definition(network, style)
    names = timm_names(model, style)
    title = network.name or type(model).__name__
    check_names("state_dict", title, names.values(), state_dict, "build the model of the same size, with its gates")
    check_sizes(model, names, state_dict)
    targets = dict(model.named_parameters())
    values = _values(network, names, state_dict, style)
    remedy = "build the model with the state dict's num_classes, in_channels and group_size"
    check_shapes("state_dict", targets, values, names, remedy)
    copy_in(targets, values)
    return model


def _check_definition(model: Backbone, style: TimmStyle) -> None:
    """Raise unless the model computes what timm's network does, its parameters aside."""
    if not isinstance(model, style.family):
        family = style.family.__name__
        raise invalid("model", type(model).__name__, f"the state dict is of an {family}", f"build an {family}")
    padding = "same" if style.official else "symmetric"
    styles = {part.padding_style for part in model.modules() if isinstance(part, PaddedConv2d)}
    if styles != {padding}:
        reason = "it has skip gains, as its dm_ models do" if style.official else "it has no skip gains"
        rule = f"timm's network ({reason}) pads {padding!r}"
        raise invalid("padding", " and ".join(sorted(styles)), rule, f"pass padding={padding!r} to create_model")
    alpha = cast("NFBackbone", model).alpha
    if alpha != TIMM_ALPHA:
        raise invalid("alpha", alpha, f"timm's is {TIMM_ALPHA}", f"pass alpha={TIMM_ALPHA}")


def _timm_gamma(model: Backbone) -> float:
    activation = cast("nn.Module", model.final.get_submodule("activation"))
    name = _ACTIVATION_NAMES.get(type(activation))
    if name is None:
        raise invalid("activation", activation, "timm has no constant for it", "pass the one timm's network has")
    return OFFICIAL_GAMMA[name]


def _values(
    model: Backbone, names: Mapping[str, str], state_dict: Mapping[str, Tensor], style: TimmStyle
) -> dict[str, Tensor]:
    """Return what goes into each of our parameters; what is computed is so in float64."""
    values = {ours: state_dict[theirs].detach() for ours, theirs in names.items()}
    gamma = _timm_gamma(model)
    for ours, value in values.items():
        if ours.endswith(".gain"):
            # gamma of the input, in timm relative to ours; ours is in input_scale, beta of both is the same.
            plain = ours.startswith(_LIKE_NO_OTHER)
            factor = (1.0 if style.official else gamma) if plain else gamma / model.feature_scale
            ratio = _standardization_ratio(values[ours.replace(".gain", ".weight")])
            values[ours] = value.double().flatten() * factor * ratio
        elif "squeeze_excite" in ours and value.dim() == 4:
            values[ours] = value.flatten(1)
        elif ours == "classifier.weight":
            values[ours] = value.double() * ((gamma if style.official else 1.0) / model.feature_scale)
    skip_gains = {ours: target for ours, target in model.named_parameters() if ours not in names}
    return values | {ours: torch.ones_like(target) for ours, target in skip_gains.items()}


def _standardization_ratio(weight: Tensor) -> Tensor:
    """Return timm's factor of the centred filters relative to ours, [O]."""
    rows = weight.double().flatten(1)
    variance, fan_in = rows.var(1, correction=0), rows.shape[1]
    ours = (fan_in * variance).clamp_min(VARIANCE_FLOOR).rsqrt()
    theirs = (variance + TIMM_EPS).rsqrt() / math.sqrt(fan_in)
    return theirs / ours


# What a state dict is of, and timm's names. All of timm's normalizer-free networks are one class, so a state dict does
# not say which it is; its tensors do, but for the activation. Source: timm's ``models/nfnet.py``, for names, constants
# and where it departs from the papers.

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
    __tracebackhide__ = True
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
