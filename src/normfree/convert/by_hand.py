"""Where conversion cannot plan a model without norms: a few lines of Python that give it a healthy start by hand.

The lines work on the caller's ``model`` and name its own parameters. What they do is the least that holds the variance:
weights of variance 1 / fan-in (orthogonal ones where there are no residual branches), and the last weight of each of L
residual branches smaller by √L, so that all of them together add about as much as there was.

Source: the scale of the branches is that of GPT-2 (Radford et al. 2019, section 2.3).
"""

from __future__ import annotations

from collections.abc import Collection, Container

from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves

from normfree.convert.dataflow import Step
from normfree.convert.structure import Structure
from normfree.trace.graph import Node

_PARAMETRIZED = """\
import normfree
from torch import nn

for module in model.modules():  # weights that are computed become plain ones, which conversion can standardize
    if nn.utils.parametrize.is_parametrized(module, "weight"):
        nn.utils.parametrize.remove_parametrizations(module, "weight")
    elif hasattr(module, "weight_g"):
        nn.utils.remove_weight_norm(module)
model = normfree.convert(model, batch)
"""

_ORTHOGONAL = """\
import torch

for name, weight in model.named_parameters():
    if name.endswith({names}):
        torch.nn.init.orthogonal_(weight, gain={gain:g})
"""

_BRANCHES = """\
import torch

last = {last}  # the last weight of each residual branch
for name, weight in model.named_parameters():
    if name.endswith({names}):
        scale = {scale:.2g} if name.endswith(last) else 1.0
        torch.nn.init.normal_(weight, std=scale * weight.shape[1:].numel() ** -0.5)
"""


# Of a gated cell, whose gates halve what they let through twice.
_GATED = 4.0
_GATED_CELLS = (nn.LSTM, nn.GRU, nn.LSTMCell, nn.GRUCell)


def code_by_hand(structure: Structure, model: nn.Module, heads: Container[str]) -> str:
    """Lines to be pasted where ``model`` is the model and ``batch`` its input; "" where there is nothing to set.

    Args:
        structure: of the model.
        model: the model.
        heads: names of the layers that nothing follows, which stay as they are.
    """
    if any(parametrize.is_parametrized(m, "weight") or hasattr(m, "weight_g") for m in model.modules()):
        return _PARAMETRIZED
    flow, weights = structure.flow, _Weights(model)
    ends = {name for addition in flow.additions if (name := weights.nearest(structure, addition.branch))}
    if ends:
        regions = (structure.region(addition, addition.branch) for addition in flow.additions)
        steps = (flow.made_by[node] for region in regions for node in region if node in flow.made_by)
        inside = {name for step in steps for name in weights.of(step)}
        return _BRANCHES.format(
            last=weights.endings(ends), names=weights.endings(inside | ends), scale=len(flow.additions) ** -0.5
        )
    names = {name for step in flow.steps for name in weights.of(step) if name.rpartition(".")[0] not in heads}
    gated = [isinstance(model.get_submodule(name.rpartition(".")[0]), _GATED_CELLS) for name in names]
    gain = _GATED if any(gated) else 1.0
    return _ORTHOGONAL.format(names=weights.endings(names), gain=gain) if names else ""


class _Weights:
    """The weights of a model, by where their memory begins."""

    def __init__(self, model: nn.Module) -> None:
        self.names = {p.untyped_storage().data_ptr(): name for name, p in model.named_parameters() if p.dim() > 1}

    def of(self, step: Step) -> list[str]:
        """Those an operation multiplies by, in the order of its arguments."""
        if not any(node.step.weighted for node in step.outputs):
            return []
        given = (leaf for leaf in tree_leaves((step.args, step.kwargs)) if isinstance(leaf, Tensor))
        return [name for tensor in given if (name := self.names.get(tensor.untyped_storage().data_ptr()))]

    def nearest(self, structure: Structure, node: Node) -> str:
        """The last weight behind an activation; "" for none."""
        flow = structure.flow
        for each in flow.backwards(node, stop=lambda one: one.step.weighted > 0):
            if each in flow.made_by and (found := self.of(flow.made_by[each])):
                return found[-1]
        return ""

    def endings(self, names: Collection[str]) -> str:
        """Names as a tuple in Python; without what counts the blocks, where no other name ends so."""
        short = {".".join(_behind_the_count(name.split("."))) for name in names}
        others = set(self.names.values()) - set(names)
        fits = not any(other.endswith(tuple(short)) for other in others)
        return repr(tuple(sorted(short if fits else names))).replace("'", '"')


def _behind_the_count(parts: list[str]) -> list[str]:
    """What follows the first number in a name; all of it where there is none, or nothing more than an attribute."""
    first = next((place for place, part in enumerate(parts) if part.isdigit()), -1)
    return parts[first + 1 :] if len(parts) - first > 2 else parts
