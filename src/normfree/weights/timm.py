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
from collections.abc import Mapping
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from normfree.common.checks import invalid
from normfree.models import Backbone
from normfree.models.registry import check_backbone
from normfree.models.scaffold import NFBackbone
from normfree.nn import ACTIVATIONS, OFFICIAL_GAMMA, VARIANCE_FLOOR, PaddedConv2d
from normfree.weights.matching import check_names, check_shapes, copy_in, without_wrappers
from normfree.weights.timm_names import TimmStyle, check_sizes, recognize, timm_names

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
    alpha = cast(NFBackbone, model).alpha
    if alpha != TIMM_ALPHA:
        raise invalid("alpha", alpha, f"timm's is {TIMM_ALPHA}", f"pass alpha={TIMM_ALPHA}")


def _timm_gamma(model: Backbone) -> float:
    activation = cast(nn.Module, model.final.get_submodule("activation"))
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
