"""Overrides of a model as one word, the way a command line gives them."""

from __future__ import annotations

import ast
from typing import Any


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
