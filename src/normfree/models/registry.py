"""Models by name: the table of the families' variants, and the function that builds from it.

Overrides are what may differ from a named model: the arguments of the families' constructors, for type checkers and
editors. A family takes some of them (``accepted_overrides(name)``), under these names and with these types.
"""

from __future__ import annotations

import ast
import fnmatch
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, TypeVar, Unpack

from torch import nn

from normfree.common.checks import check_flag, invalid, suggestion
from normfree.models.scaffold import Backbone
from normfree.nn import Activation
from normfree.nn.centring import centre_weights
from normfree.nn.padding import PaddingStyle

Stem = Literal["imagenet", "cifar"]
"""Of a ResNet: for images of about 224 pixels, or of 32."""

ConvolutionName = Literal["scaled_ws", "scaled"]
"""With standardized weights, or with plain ones of LeCun's variance."""

Norm = Literal["batch", "group", "layer", "instance"] | None
"""What a pre-activation ResNet normalizes by; None: nothing does."""

Order = Literal["norm-act", "act-norm"]
"""Of normalizer and activation before a convolution."""


class Overrides(TypedDict, total=False):
    """Keyword arguments of :func:`normfree.create_model` beside those that every model takes."""

    depths: Sequence[int]
    base_widths: Sequence[int]
    width: float
    widths: Sequence[int] | None
    group_size: int | Sequence[int]
    expansion: float | Sequence[float]
    alpha: float
    activation: Activation
    use_se: bool
    se_ratio: float
    stochdepth_rate: float
    drop_rate: float
    skipinit_gain: float
    train_size: int
    test_size: int
    conv: ConvolutionName
    stem: Stem
    norm: Norm
    order: Order
    centred: bool


Family = TypeVar("Family", bound=type[Backbone])

# Arguments of every model; all other keyword-only arguments of a family's constructor are its overrides.
_COMMON = ("num_classes", "in_channels", "padding")

CENTRED = "centred"
"""The override that centres the weights of a network's standardized layers (:mod:`normfree.nn.centring`)."""


@dataclass(frozen=True)
class Variant:
    """A named variant of a family: the arguments that differ from the family's defaults."""

    family: type[Backbone]
    arguments: Mapping[str, Any]


_VARIANTS: dict[str, Variant] = {}


def register(variants: Mapping[str, Mapping[str, Any]]) -> Callable[[Family], Family]:
    """Return a class decorator that enters a family under the names of its variants.

    Args:
        variants: for each name the constructor arguments that make it, such as ``{"depths": (3, 4, 6, 3)}``.
    """

    def enter(family: Family) -> Family:
        for name, arguments in variants.items():
            assert name not in _VARIANTS, f"{name} is registered twice"
            _VARIANTS[name] = Variant(family, arguments)
        return family

    return enter


def list_models(pattern: str = "*") -> list[str]:
    """Return the names that ``create_model`` knows, numbers in order of size.

    Args:
        pattern: a shell pattern such as ``"nf_resnet*"``.
    """
    return sorted(fnmatch.filter(_VARIANTS, pattern), key=_natural)


def _natural(name: str) -> list[tuple[int, str, int]]:
    """Sort key under which resnet50 comes before resnet101."""
    parts = re.findall(r"\d+|\D+", name)
    return [(1, "", int(part)) if part.isdigit() else (0, part, 0) for part in parts]


def accepted_overrides(name: str) -> list[str]:
    """Return the overrides that ``create_model`` takes for a model.

    Raises:
        ValueError: unknown name.
    """
    family = _variant(name).family
    parameters = inspect.signature(family).parameters.values()
    keywords = (parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY)
    return [*(keyword for keyword in keywords if keyword not in _COMMON), *([CENTRED] if family.standardized else [])]


def create_model(
    name: str,
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    padding: PaddingStyle = "symmetric",
    **overrides: Unpack[Overrides],
) -> Backbone:
    """Build a freshly initialised model.

    Args:
        name: one of ``list_models()``.
        num_classes: outputs of the classifier; 0 leaves the classifier out, and the model returns its pooled
            features.
        in_channels: channels of the input.
        padding: "symmetric" (PyTorch's) or "same" (TensorFlow's, which official weights need).
        overrides: what differs from the named variant; ``accepted_overrides(name)`` lists them, the family's
            class explains them. ``centred=True``, for networks with standardized weights, centres these weights
            (:mod:`normfree.nn.centring`).

    Returns:
        The model, in training mode. ``create_model(**model.config)`` builds another like it.

    Raises:
        ValueError: unknown name or override, or a value that breaks its rule.
    """
    __tracebackhide__ = True
    variant = _variant(name)
    accepted = accepted_overrides(name)
    for override, value in overrides.items():
        if override not in accepted:
            raise invalid(override, value, f"{name} has no such override", f"it takes {', '.join(accepted)}")
    if "width" in overrides and overrides.get("widths") is not None:
        rule = "widths gives the stages' channels themselves, so there is nothing left to multiply"
        raise invalid("width", overrides["width"], rule, "pass one of the two")
    common = {"num_classes": num_classes, "in_channels": in_channels, "padding": padding}
    own = {override: value for override, value in overrides.items() if override != CENTRED}
    model = variant.family(**common, **{**variant.arguments, **own})
    if check_flag(CENTRED, overrides.get(CENTRED, False)):
        centre_weights(model)
    model.name = name
    model.config = {"name": name, **common, **overrides}
    return model


def _variant(name: str) -> Variant:
    __tracebackhide__ = True
    if not isinstance(name, str) or name not in _VARIANTS:
        raise invalid("name", name, "no such model", suggestion(str(name), _VARIANTS))
    return _VARIANTS[name]


def parse_overrides(text: str) -> dict[str, Any]:
    """Return ``width=1,activation=silu,depths=(1,1,1,1)`` as keyword arguments.

    Args:
        text: what stands after the colon of ``nf_resnet50:width=1``; values are Python literals or bare words.

    Raises:
        ValueError: if it is anything else.
    """
    if not text:
        return {}
    wrong = f"model: overrides {text!r} are not NAME=VALUE,…; for example width=1,activation=silu"
    try:
        call = ast.parse(f"f({text})", mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
            raise ValueError(wrong)
        names = [keyword.arg for keyword in call.keywords]
        if None in names or "name" in names or len(set(names)) < len(names):
            raise ValueError(wrong)
        return {str(keyword.arg): _value(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise ValueError(wrong) from error


def _value(node: ast.expr) -> Any:
    """A literal, or a bare word as a string."""
    return node.id if isinstance(node, ast.Name) else ast.literal_eval(node)


def check_backbone(model: object, otherwise: str = "pass a model that normfree.create_model built") -> Backbone:
    """Return a model of ``create_model``; refuse any other.

    Args:
        model: of the argument of that name.
        otherwise: remedy where no part of it is such a model.

    Raises:
        ValueError: it is another one; the message names the part of it that would do, if there is one.
    """
    __tracebackhide__ = True
    if isinstance(model, Backbone):
        return model
    parts = model.named_modules() if isinstance(model, nn.Module) else ()
    inside = next((name for name, part in parts if isinstance(part, Backbone)), None)
    remedy = otherwise if inside is None else f"pass the one inside it, model.{inside}"
    raise invalid("model", type(model).__name__, "was not built by normfree.create_model", remedy)
