"""The remedy of each finding, in words and as lines of Python that do what the words say.

The lines are to be pasted where ``model`` is the model and ``batch`` its input, and they work on the model in hand:
what they are depends on what it is made of. They are remedies for a model at initialisation: most draw weights anew.

*By conversion*, where there is something to standardize. *By hand* elsewhere: weights of variance 1 / fan-in
(orthogonal ones where there are no residual branches), the last weight of each of L residual branches smaller by √L, so
that all of them together add about as much as there was, and biases of zero.

Source: the scale of the branches is that of GPT-2 (Radford et al. 2019, section 2.3).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from normfree.signal.architecture import Architecture
from normfree.signal.propagation import NonFinite

DOCS = "docs/signal.md"
"""The page on findings, which has an anchor for each kind."""


@dataclass(frozen=True)
class Remedy:
    """What to do about a finding.

    Attributes:
        text: in words.
        code: as lines of Python; "" where there are none.
    """

    text: str
    code: str


CONVERT = """\
import normfree

model = normfree.convert(model, batch)  # {what}
normfree.spp(model, batch).assert_healthy()
"""

PARAMETRIZED = """\
import normfree
from torch import nn

for module in model.modules():  # weights that are computed become plain ones, which conversion can standardize
    if nn.utils.parametrize.is_parametrized(module, "weight"):
        nn.utils.parametrize.remove_parametrizations(module, "weight")
    elif hasattr(module, "weight_g"):
        nn.utils.remove_weight_norm(module)
model = normfree.convert(model, batch)
"""

_DRAWN = """\
import torch

for name, weight in model.named_parameters():
{cases}    elif "bias" in name:
        torch.nn.init.zeros_(weight)
"""

_ORTHOGONAL = """\
    {word} {chosen}:{note}
        torch.nn.init.orthogonal_(weight, gain={gain:.3g})
"""

_BRANCHES = """\
import torch

last = {last}  # the last weight of each residual branch
for name, weight in model.named_parameters():
    if {chosen}:
        scale = {scale:.2g} if {is_last} else 1.0
        torch.nn.init.normal_(weight, std=scale * weight.shape[1:].numel() ** -0.5)
    elif "bias" in name:
        torch.nn.init.zeros_(weight)
"""

GATED_GAIN = 4.0
"""Of a gated cell, whose gates halve what they let through twice."""

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

_WITHOUT_ACTIVATION = """\
from torch import nn

model.set_submodule({module!r}, nn.Identity())  # or nn.Softplus(), where the output has to be positive
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

UNREACHED = """\
import torch

sum(output.sum() for output in torch.utils._pytree.tree_leaves(model(batch))).backward()
print([name for name, parameter in model.named_parameters() if parameter.grad is None])
"""

# Of a model whose values are of this size before they stop being finite, the size is the trouble.
_LARGE = 1e4


# --- what the lines do, and the lines ---------------------------------------------------------------------------------


def _by_conversion(made_of: Architecture) -> str:
    branches = "; branches as alpha * f(x / beta)" if made_of.residual else ""
    return CONVERT.format(what=f"new weights, standardized, with gamma{branches}")


def by_hand(made_of: Architecture, *, beside: bool = False) -> Remedy:
    """Weights drawn anew where conversion has nothing to standardize; empty where there is nothing to set.

    Args:
        made_of: of what the model is made.
        beside: the weights outside residual branches are drawn anew, too.
    """
    everything = {*made_of.branches, *made_of.weights, *made_of.others}
    if made_of.computed:
        return Remedy("Make the weights that are computed plain ones, and convert the model.", PARAMETRIZED)
    if made_of.periodic:
        slope = "The slope of the sine multiplies each gradient: draw the weights before it smaller (SIREN: uniform"
        return Remedy(f"{slope} within √(6 / fan-in) / ω, for sin(ω·x)).", "")
    if made_of.ends and not made_of.gated:
        names = {*made_of.branches, *(made_of.weights if beside else ())}
        again = bool(made_of.own_output)
        by = f"{made_of.residual}, for it is added as often" if again else f"√{made_of.residual}"
        text = (
            f"Draw weights of variance 1 / fan-in{'' if beside else ' in the branches'}, and the last weight of each "
            f"of the {made_of.residual} residual branches smaller by {by}: all branches together then add about as "
            "much as there was. Biases start at zero."
        )
        scale = made_of.residual ** (-1.0 if again else -0.5)
        return Remedy(text, _branches_code(names, made_of.ends, scale, everything))
    cells, again = {*made_of.gated}, {*made_of.own_output}
    names = {*made_of.weights, *made_of.branches} - cells - again
    rectified = "ReLU" in made_of.activations
    groups = [
        (cells, GATED_GAIN, "  # gated cells: their gates halve what they let through twice"),
        (again, 1.0, "  # layers that run on their own output" if cells or (names and rectified) else ""),
        (names, 2**0.5 if rectified else 1.0, ""),
    ]
    if not any(names for names, _, _ in groups):
        return Remedy("", "")
    gated = ", four times as large in gated cells, whose gates halve what they let through twice" if cells else ""
    bent = ", of gain √2 before ReLU" if names and rectified else ""
    text = f"Draw orthogonal weights, which keep the variance{gated}{bent}{', and biases of zero' if names else ''}."
    return Remedy(text, _orthogonal_code(groups, everything))


def _remedy(made_of: Architecture, by_conversion: str, otherwise: str, *, beside: bool = False) -> Remedy:
    """A remedy by conversion where that has something to standardize, by hand elsewhere."""
    if made_of.convertible and not made_of.computed:
        return Remedy(by_conversion, _by_conversion(made_of))
    drawn = by_hand(made_of, beside=beside)
    return Remedy(" ".join(part for part in (drawn.text, otherwise) if part), drawn.code)


def _orthogonal_code(groups: Sequence[tuple[Collection[str], float, str]], everything: Collection[str]) -> str:
    """The lines that draw orthogonal weights: of each group of them, the names, the gain and a comment."""
    cases = ""
    for names, gain, note in groups:
        if names:
            told, chosen = _chosen(names, everything)
            word = "elif" if cases else "if"
            cases += _ORTHOGONAL.format(word=word, chosen=chosen.format(told), note=note, gain=gain)
    return _DRAWN.format(cases=cases)


def _branches_code(names: Collection[str], ends: Collection[str], scale: float, everything: Collection[str]) -> str:
    """The lines that draw the weights of residual branches, and the last of each smaller by a scale."""
    last, is_last = _chosen(ends, everything)
    told, chosen = _chosen({*names, *ends}, everything)
    return _BRANCHES.format(last=last, chosen=chosen.format(told), is_last=is_last.format("last"), scale=scale)


def _chosen(names: Collection[str], everything: Collection[str]) -> tuple[str, str]:
    """Names as a tuple in Python, and the condition with a place for it.

    Without what counts the blocks, where no other name ends so; else each name in full.
    """
    short = {".".join(_without_count(name.split("."))) for name in names}
    others = set(everything) - set(names)
    fits = not any(other.endswith(tuple(short)) for other in others)
    told = repr(tuple(sorted(short if fits else names))).replace("'", '"')
    return told, "name.endswith({})" if fits else "name in {}"


def _without_count(parts: list[str]) -> list[str]:
    """What follows the first number in a name; all of it where there is none, or nothing more than an attribute."""
    first = next((place for place, part in enumerate(parts) if part.isdigit()), -1)
    return parts[first + 1 :] if len(parts) - first > 2 else parts


# --- by kind of finding -----------------------------------------------------------------------------------------------


def explosion(made_of: Architecture, *, residual: bool, silenced: bool) -> Remedy:
    """Of a variance that grows.

    Args:
        made_of: of what the model is made.
        residual: it grows from block to block.
        silenced: all branches start at zero.
    """
    if residual:
        zero = "; the zero gains hide it only until they have been trained." if silenced else ", or start them at zero."
        scaled = (
            "Make each branch variance preserving and scale it before the addition: x + α·f(x/β) with scaled weight "
            f"standardization and β from the variance plan{zero}"
        )
        return _remedy(made_of, scaled, "Or put a normalizer before each branch, or start the branches at zero.")
    gain = (
        f"Give the layers the gain of their activation, 1/sqrt(E[act(z)²]){_he(made_of)}, or scaled weight "
        "standardization with its γ, or put a normalizer after them."
    )
    return _remedy(made_of, gain, "Or put a normalizer after the layers.", beside=True)


def attenuation(made_of: Architecture, *, residual: bool, averaged: bool) -> Remedy:
    """Of a variance that falls.

    Args:
        made_of: of what the model is made.
        residual: it falls from block to block.
        averaged: an average pool lies on the way.
    """
    if made_of.periodic:
        rule = "weights drawn uniform within √(6 / fan-in) / ω, ω·x has unit variance inside sin(ω·x)"
        return Remedy(f"Nothing, where a factor ω that follows brings the signal back: with {rule} (SIREN).", "")
    pools = "average pools cut white noise but not images." if averaged else ""
    gain = (
        f"Raise the gain of the weights to 1/sqrt(E[act(z)²]){_he(made_of)}, or use scaled weight standardization with "
        f"the γ of the activation{'; ' + pools if averaged else '.'}"
    )
    otherwise = f"Or put a normalizer after the layers{'; ' + pools if averaged else '.'}"
    return _remedy(made_of, gain, otherwise, beside=not residual)


def mean_shift(made_of: Architecture, *, residual: bool, last: bool = False) -> Remedy:
    """Of channels that carry an offset.

    Args:
        made_of: of what the model is made.
        residual: sums carry it, and not layers alone.
        last: it is largest after a layer that no other follows.
    """
    layers = f" ({_list(made_of.standardized)})" if made_of.standardized else ""
    standardized = (
        "Standardize the weights, so that each filter sums to zero and the positive mean of the activation cannot turn "
        f"into an offset{layers}, or normalize after the activation."
    )
    if (not residual or made_of.gated) and not made_of.convertible:
        off = "an output may have one" if last else "a normalizer before the next layer takes it off"
        return Remedy(f"Nothing, if the signal is healthy otherwise; {off}.", "")
    smaller = "An offset feeds itself through the branches, and less through small ones." if made_of.residual else ""
    layer_norm = "Or centre what the layers read, by a normalizer before them."
    return _remedy(made_of, standardized, " ".join(filter(None, (smaller, layer_norm))), beside=True)


def branch_variance(made_of: Architecture, *, small_alone: bool) -> Remedy:
    """Of branches that do not keep the variance.

    Args:
        made_of: of what the model is made.
        small_alone: none of them adds more than it should.
    """
    small = "a branch that is small on purpose (small initialisation, layer scale) may stay."
    scaled = f"Feed the branch a signal of unit variance (divide by β) and use the gain γ of its activations; {small}"
    if small_alone and not made_of.convertible:
        return Remedy(f"Nothing, if intended: {small}", "")
    return _remedy(made_of, scaled, _capital(small))


def variance_plan(gain: float | None) -> str:
    """Of a variance that is not the planned one.

    Args:
        gain: the variance that a branch gives to that which the plan would have it give, for what it reads; of most
            branches. None where that is not known.
    """
    if gain is not None and not 0.7 < gain < 1.4:
        return (
            f"A branch gives {gain:.2g} times the variance that it should: look for a γ that is missing, or for the "
            "factor 2 of a squeeze-excite gate."
        )
    return "Compare alpha and beta of the blocks with those that the plan was made for: variance_plan(depths, alpha)."


def outweighed_branches(made_of: Architecture) -> Remedy:
    """Of branches that are nothing beside their stream."""
    text = "Bring the stream to unit variance where it begins: standardize the input, or scale the first layer."
    return Remedy(text, _by_conversion(made_of) if made_of.convertible and not made_of.computed else "")


def correlation_collapse(made_of: Architecture) -> Remedy:
    """Of inputs that become alike."""
    shortcut = "strengthen the shortcut against the branch (α)" if made_of.residual else "add shortcuts"
    ways = f"Remove the mean shift (standardize the weights), {shortcut}, or use an activation closer to linear."
    return _remedy(made_of, ways, f"Or {shortcut}, or use an activation closer to linear.", beside=True)


def dead_channels(made_of: Architecture, *, fades: bool, residual: bool) -> Remedy:
    """Of channels that are constant.

    Args:
        made_of: of what the model is made.
        fades: the signal fades, so that what is left of it may be rounding.
        residual: as of :func:`attenuation`.
    """
    look = "Look for zero filters, saturated or clipped activations, biases far below zero, and padded channels."
    if not fades:
        return Remedy(f"{look} The lines draw all layers anew.", RESET)
    cured = attenuation(made_of, residual=residual, averaged=False)
    return Remedy(f"What fades into rounding is constant, too: cure the attenuation first. {cured.text}", cured.code)


def dead_output(made_of: Architecture) -> Remedy:
    """Of an output that is the same for every input, and moves nothing."""
    if not made_of.last_activation:
        last = "a factor of zero, a clamp, a softmax of one class"
        return Remedy(f"Look at what acts on the output last ({last}): no gradient passes it.", "")
    text = (
        f"Leave out the last {made_of.last_activation}, which has no derivative there; where the output has to be "
        "positive, nn.Softplus has one everywhere."
    )
    return Remedy(text, _WITHOUT_ACTIVATION.format(module=made_of.last_module) if made_of.last_module else "")


def gradient_explosion(made_of: Architecture) -> Remedy:
    """Of a gradient that grows towards the input."""
    bent = [name for name in made_of.activations if name not in made_of.saturating]
    ways = [
        f"gains of {_list(made_of.saturating)} at 1" if made_of.saturating else "",
        f"biases at which {_list(bent)} {'are' if len(bent) > 1 else 'is'} nearly linear" if bent else "",
    ]
    kept = " and ".join(["the chain without normalizers", *filter(None, ways)])
    if made_of.residual:
        text, otherwise = "Make the branches smaller against the shortcut (x + α·f(x/β) with α below 1).", ""
    else:
        text = f"Add residual connections (x + α·f(x) with α below 1); or keep {kept}, as conversion does."
        otherwise = "Or add residual connections (x + α·f(x) with α below 1)."
    return _remedy(made_of, text, otherwise, beside=True)


def gradient_vanishing(made_of: Architecture) -> Remedy:
    """Of a gradient that falls towards the input."""
    smooth = f"use activations that do not saturate in the place of {_list(made_of.saturating)} (ReLU, SiLU or GELU)"
    shortcuts = "" if made_of.residual else "add residual connections"
    fitting = "give the weights the gain that fits the activation, "
    fitting += f"1/sqrt(E[act(z)²]){_he(made_of)}" if made_of.activations else "1 where there is none"
    saturates = made_of.saturating and not made_of.recurrent
    text = "; ".join(filter(None, (smooth if saturates else "", fitting, shortcuts)))
    otherwise = " and ".join(filter(None, (smooth if saturates else "", shortcuts)))
    return _remedy(made_of, f"{_capital(text)}.", f"Or {otherwise}." if otherwise else "", beside=True)


def wake(gains: Iterable[str]) -> str:
    """The lines that set zero gains to one.

    Args:
        gains: their names in the model; of a norm's weight the last two parts tell it from others, else the last.
    """
    parts = (name.split(".") for name in gains)
    ends = {".".join(each[-2:] if each[-1] == "weight" else each[-1:]) for each in parts}
    return _WAKE.format(names=repr(tuple(sorted(ends))).replace("'", '"'))


def non_finite(made_of: Architecture, found: NonFinite | None, *, residual: bool) -> Remedy:
    """Of values that stop being finite, for they become too large, or by an operation on usual ones.

    Args:
        made_of: of what the model is made.
        found: the first operation that made one, if that is known.
        residual: as of :func:`explosion`.
    """
    if found is not None and found.largest < _LARGE:
        text = (
            "Look at that operation: a division by zero, a logarithm or root of a negative number, or a range half "
            "precision does not have."
        )
        return Remedy(text, _HOLD.format(module=found.module))
    cured = explosion(made_of, residual=residual, silenced=False)
    return Remedy(f"The magnitudes before it explode: cure that. {cured.text}", cured.code)


def _he(made_of: Architecture) -> str:
    """What the gain is for the ReLU, where there is one."""
    return " (√2 for ReLU, He's initialisation)" if "ReLU" in made_of.activations else ""


def _list(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def uneven_inputs(axis: int) -> Remedy:
    """Channels of an input that have very different sizes.

    Args:
        axis: of the channels.
    """
    return Remedy(
        "Standardize the data before all else: from each channel take its mean, and divide by its deviation, both over "
        "the training set (a logarithm first where values span powers of ten).",
        f"""\
import torch

axes = [axis for axis in range(batch.dim()) if axis != {axis}]  # all but the channels'
mean, deviation = (of(batch, axes, keepdim=True) for of in (torch.mean, torch.std))  # better: of the training set
batch = (batch - mean) / deviation.clamp_min(1e-6)""",
    )
