"""The remedy of each finding as lines of Python to be pasted, where ``model`` is the model and ``batch`` its input.

They are remedies for a model at initialisation: most draw weights anew.
"""

from __future__ import annotations

from collections.abc import Iterable

from normfree.signal.nonfinite import NonFinite

DOCS = "docs/signal.md"
"""The page on findings, which has an anchor for each kind."""

CONVERT = """\
import normfree

model = normfree.convert(model, batch)  # new weights, standardized, with gamma; branches as alpha * f(x / beta)
normfree.spp(model, batch).assert_healthy()
"""

FILL = """\
from torch import nn

for module in model.modules():
    weight = getattr(module, "weight", None)
    if weight is not None and weight.dim() > 1 and not weight.any():
        nn.init.kaiming_normal_(weight)
"""

RESET = """\
for module in model.modules():
    if hasattr(module, "reset_parameters"):
        module.reset_parameters()
"""

_WAKE = """\
from torch import nn

for name, gain in model.named_parameters():
    if name.endswith({names}) and not gain.any():
        nn.init.ones_(gain)
"""

_HOLD = """\
import torch

module = model.get_submodule({module!r})  # holds the values until the operation in it is mended
module.register_forward_hook(lambda module, inputs, output: torch.nan_to_num(output, 0.0, 0.0, 0.0))
"""

TRACE = """\
import torch

with torch.autograd.detect_anomaly():  # raises an error that shows the line
    sum(output.sum() for output in torch.utils._pytree.tree_leaves(model(batch))).backward()
"""

# Of a model whose values are of this size before they stop being finite, the size is the trouble.
_LARGE = 1e4


def wake(gains: Iterable[str]) -> str:
    """The lines that set zero gains to one.

    Args:
        gains: their names in the model; of a norm's weight the last two parts tell it from others, else the last.
    """
    parts = (name.split(".") for name in gains)
    endings = {".".join(each[-2:] if each[-1] == "weight" else each[-1:]) for each in parts}
    return _WAKE.format(names=repr(tuple(sorted(endings))).replace("'", '"'))


def make_finite(found: NonFinite | None) -> str:
    """The lines for values that stop being finite, for they become too large, or by an operation on usual ones.

    Args:
        found: the first operation that made one, if that is known.
    """
    return _HOLD.format(module=found.module) if found is not None and found.largest < _LARGE else CONVERT
