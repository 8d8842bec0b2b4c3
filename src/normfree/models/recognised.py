"""Is this a model of ``create_model``? Where it is not, but holds one, the message says where."""

from __future__ import annotations

from torch import nn

from normfree.common.checks import invalid
from normfree.models.backbone import Backbone


def check_backbone(model: object, otherwise: str = "pass a model that normfree.create_model built") -> Backbone:
    """Return a model of ``create_model``; refuse any other.

    Args:
        model: of the argument of that name.
        otherwise: remedy where no part of it is such a model.

    Raises:
        ValueError: it is another one; the message names the part of it that would do, if there is one.
    """
    if isinstance(model, Backbone):
        return model
    parts = model.named_modules() if isinstance(model, nn.Module) else ()
    inside = next((name for name, part in parts if isinstance(part, Backbone)), None)
    remedy = otherwise if inside is None else f"pass the one inside it, model.{inside}"
    raise invalid("model", type(model).__name__, "was not built by normfree.create_model", remedy)
