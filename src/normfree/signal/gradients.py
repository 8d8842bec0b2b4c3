"""The gradient curve: how large the gradient of a random projection of the output is at every point.

One forward pass with gradients notes where each point lies in the autograd graph, and one backward pass gives the
gradient there. ``torch.autograd.grad`` computes the gradients of activations alone, at two thirds of the cost of a
training step's backward pass. It is refused by what calls the backward pass itself from within (re-entrant checkpoints,
reversible networks); there the whole backward pass runs, and what it does to parameters is undone.

*The rules*: whether the early layers can be trained through the later ones.

Legend: at a point with activation x and gradient g of a random projection of the output, G = ‖g‖² per example, V the
average channel variance of x, and S = G·V, the *sensitivity*: how much the output moves (squared) if every value of x
moves by its own standard deviation, each in a direction of its own.

Why S. Per value, the gradient changes with every change of shape, and with every scale that a normalizer takes out
again: a weight twice as large halves the gradient before it. G is the same on both sides of a layer that keeps the
variance, whatever its fan-out and stride, and S on both sides of any linear one. Were x Gaussian noise, the variance
of the output would be S at most, by the Gaussian Poincaré inequality, and S exactly if the output were linear in x. So

- S / (variance of the output) says how far the output is from linear in x: √ of it is how many times x would have to
  be divided for the linear approximation, which is all that a gradient knows, to hold. A chain of linear layer,
  BatchNorm and ReLU multiplies S by π/(π − 1) = 1.467 a layer (Yang et al., 2019): 2·10⁸ in 50 layers.
- S far below the variance of the output says that what varies in the output does not come from x.

Between two points their ratio says the same of what lies between them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import inf, isfinite, log10, prod, sqrt
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from normfree.common.checks import available_memory
from normfree.common.torch_compat import (
    base_of_view,
    next_sequence_number,
    sequence_number,
    tree_leaves,
    tree_map,
    without_gradient_hooks,
)
from normfree.signal import remedies
from normfree.signal.architecture import Architecture
from normfree.signal.propagation import BlockSignal, Finding, SignalPropagation
from normfree.signal.remedies import TRACE, UNREACHED
from normfree.trace.graph import Node, Residual
from normfree.trace.inputs import Batch, ModuleStack, run_once, tensors_of
from normfree.trace.preserve import Preserved
from normfree.trace.recorder import Recorder, running_function


@dataclass(frozen=True)
class Gradients:
    """What a backward pass gave.

    Attributes:
        sq_means: mean squared gradient at every point, None where none arrives; None for all if it was not measured.
        note: why it was not measured, or of what it is the gradient if not of the output; "" otherwise.
    """

    sq_means: list[float | None] | None
    note: str = ""


def sq_gradients(
    model: nn.Module,
    batch: Batch,
    preserved: Preserved,
    *,
    points: str,
    seed: int,
    variances: Sequence[float],
    refused: Collection[int] = (),
) -> Gradients:
    """Mean squared gradient at every point, of ``Σ r·output`` with one draw r ~ N(0, 1), from one backward pass.

    Of a complex output the real and the imaginary part are projected; of several outputs each as a whole has the weight
    of the first. Where the output does not change with any point that varies (a head that starts at zero), the last of
    these is projected in its place; unless the output is the same for all examples and no parameter gets a gradient of
    it, either: then zeros are what there is. A point within an autograd function whose backward is written out has no
    gradient of its own: None.

    Args:
        model: the model, in its measuring mode, its silenced branches woken by the pass before.
        batch: one batch.
        preserved: keeps the values of parameters about to be changed.
        points: "residual" or "layers".
        seed: of the projection.
        variances: of the points, from the pass before.
        refused: numbers of what is recorded as a point here and was not taken for one in the pass before.

    Returns:
        One number a point, or the reason why there is none.
    """
    reason, ways = "", [(False, False), (True, False)]  # a whole backward pass or not, from the last point or not
    for whole, at_last in ways:
        try:
            with torch.inference_mode(False):
                measured = _measure(
                    model, batch, preserved, points=points, seed=seed, variances=variances, refused=refused,
                    whole=whole, at_last=at_last,
                )  # fmt: skip
        except (torch.OutOfMemoryError, MemoryError) as error:
            return Gradients(None, f"not measured: the backward pass does not fit into memory ({_line(error)})")
        except Exception as error:  # a model may raise anything, and the other curves stand without this one
            cause = error.__cause__
            if isinstance(cause, (torch.OutOfMemoryError, MemoryError)):
                return Gradients(None, f"not measured: the backward pass does not fit into memory ({_line(cause)})")
            what = f"{type(error).__name__}: {_line(error)}"
            reason = reason or f"not measured: the model cannot be differentiated ({what})"
            continue
        if measured is None:  # points in a part of the graph that a whole backward pass alone makes
            continue
        found, dead = measured
        if len(found) != len(variances):
            return Gradients(
                None,
                f"not measured: the model took another way when it ran again ({len(variances)} points, then "
                f"{len(found)}); it draws or counts what cannot be repeated",
            )
        if all(value is None for value in found):
            return Gradients(
                None,
                "not measured: none arrives, as under torch.no_grad, in an autograd.Function or from integers alone",
            )
        if at_last:
            return Gradients(found, "of the last point that varies, for the output does not change with it")
        varying = [value for value, variance in zip(found, variances, strict=True) if variance != 0]
        if (
            dead or any(varying) or (not varying and any(found))
        ):  # where nothing varies, no point is better than another
            return Gradients(found)
        if whole or not varying:  # the points are in a second run, and not known when the backward pass begins
            return Gradients(None, "not measured: the output does not change with any point that varies")
        ways.insert(1, (False, True))
    return Gradients(None, reason)


def _measure(
    model: nn.Module,
    batch: Batch,
    preserved: Preserved,
    *,
    points: str,
    seed: int,
    variances: Sequence[float],
    refused: Collection[int],
    whole: bool,
    at_last: bool,
) -> tuple[list[float | None], bool] | None:
    """The gradients, and whether the output is the same for all examples and moves no parameter.

    None if points ran with gradients switched off, and only a whole pass can find them.
    """
    places: dict[int, list[Place]] = {}
    arriving = _Arriving(places)

    def on_place(index: int, place: Place) -> None:
        places.setdefault(index, []).append(place)
        if whole:
            place.edge.node.register_prehook(
                lambda gradients: arriving.add(index, place, gradients[place.edge.output_nr])
            )

    batch = tree_map(_differentiable, batch)
    stack = ModuleStack(model)
    kind = ResidualPlaces if points == "residual" else LayerPlaces
    recorder = kind(
        model,
        tensors_of(batch),
        stack=stack,
        before_writing=preserved.before_writing,
        examples=None,
        wake=False,
        on_place=on_place,
    )
    preserved.seed(seed)  # what the model draws is what it drew for the first batch
    generator = torch.Generator().manual_seed(seed)
    leaves = [tensor for tensor in preserved.tensors if tensor.is_leaf and tensor.requires_grad]
    with torch.enable_grad(), without_gradient_hooks(leaves):  # a backward pass leaves no gradient on them
        with stack.follow_modules(), recorder:
            returned = run_once(model, batch, stack)
            outputs: list[Any] = [t for t in returned if t.requires_grad]
            learning = leaves if not at_last and all(map(_is_same_for_all, returned)) else []
            recorder.take()
            if at_last:
                numbers = [number for number in range(len(recorder.names)) if number not in refused]
                varying = [n for n, variance in zip(numbers, variances, strict=True) if variance and n in places]
                last = places[max(varying)][0]
                outputs, projection = [last.edge], [_drawn(last.shape, **last.options, generator=generator)]
            else:
                projection = _weigh_alike([_drawn(t.shape, t.dtype, t.device, generator) for t in outputs])
            if whole and outputs:
                torch.autograd.backward(outputs, projection)
        if not whole and recorder.hidden:
            return None
        if not whole and outputs and places:
            ends = [(index, place) for index, all_of_point in places.items() for place in all_of_point]
            edges = [*(place.edge for _, place in ends), *map(get_gradient_edge, learning)]
            gradients = torch.autograd.grad(outputs, edges, projection, allow_unused=True)
            for (index, place), gradient in zip(ends, gradients[: len(ends)], strict=True):
                arriving.add(index, place, gradient)
            moved = gradients[len(ends) :]
        else:
            moved = [leaf.grad for leaf in learning]
        found = [arriving.sq_mean(index) for index in range(len(recorder.names)) if index not in refused]
        dead = bool(learning) and 0 in found and not any(found) and not any(g is not None and g.any() for g in moved)
    return found, dead


def _is_same_for_all(output: Tensor) -> bool:
    """Whether an output is the same for several examples."""
    return output.dim() > 0 and len(output) > 1 and bool((output == output[:1]).all())


def _drawn(shape: torch.Size, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Tensor:
    """Unit Gaussian noise; of a complex type both parts are."""
    if dtype.is_complex:
        return torch.view_as_complex(torch.randn(*shape, 2, generator=generator)).to(device, dtype)
    return torch.randn(shape, generator=generator).to(device, dtype)


def _weigh_alike(projections: Sequence[Tensor]) -> list[Tensor]:
    """The projections of several outputs, each as a whole with the weight of the first.

    A map has thousands of times more values than a class: with equal weights for each value, what lies after the last
    map would seem to receive next to nothing, and what lies before it to explode.
    """
    return [r * sqrt(projections[0].numel() / max(1, r.numel())) for r in projections]


def _differentiable(leaf: Any) -> Any:
    """A copy through which gradients flow even if every parameter is frozen, and which may be changed in place."""
    if isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex()):
        return leaf.detach().clone().requires_grad_().clone()
    return leaf


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0].rstrip(".")


@dataclass(frozen=True)
class Place:
    """Where the gradient of a point arrives.

    Attributes:
        edge: of the tensor whose memory the point is.
        part: the gradient of the point from that of the tensor.
        shape, options: of that tensor; the latter are its type and device.
    """

    edge: GradientEdge
    part: Callable[[Tensor], Tensor]
    shape: torch.Size
    options: dict[str, Any]


class _Arriving:
    """The gradients that have arrived at points; of one that was computed several times their sum.

    Args:
        places: of each point; all are known before the gradient of one arrives.
    """

    def __init__(self, places: Mapping[int, Sequence[Place]]) -> None:
        self.places = places
        self.sq_means: dict[int, float] = {}
        self.sums: dict[int, Tensor] = {}

    def add(self, index: int, place: Place, gradient: Tensor | None) -> None:
        """Take the gradient that has arrived at one place of a point; None if none has."""
        if gradient is None:
            return
        gradient = place.part(gradient)
        if len(self.places[index]) == 1:
            self.sq_means[index] = _sq_mean(gradient)
        else:
            before = self.sums.get(index)
            self.sums[index] = gradient if before is None else before + gradient

    def sq_mean(self, index: int) -> float | None:
        """The mean squared gradient at a point; None if no gradient has arrived."""
        total = self.sums.get(index)
        return self.sq_means.get(index) if total is None else _sq_mean(total)


def _sq_mean(gradient: Tensor) -> float:
    if gradient.is_complex():
        gradient = torch.view_as_real(gradient)
    return gradient.double().square().mean().item()


def _place_of(tensor: Tensor) -> Place:
    """The place of a tensor, taken after the operation that made it and before the next.

    What has been written in place through a view is known to autograd as a value of the whole tensor that is viewed:
    a later write leads the gradient there, and no longer through the view. So a view's gradient is its part of the
    gradient of the whole.
    """
    options = {"dtype": tensor.dtype, "device": tensor.device}
    whole = base_of_view(tensor)
    if whole is None or not whole.requires_grad or whole.dtype != tensor.dtype:
        return Place(get_gradient_edge(tensor), lambda gradient: gradient, tensor.shape, options)
    size, stride, offset = tensor.size(), tensor.stride(), tensor.storage_offset() - whole.storage_offset()
    whole_size, whole_stride = whole.size(), whole.stride()

    def part(gradient: Tensor) -> Tensor:
        laid_out = gradient.new_empty_strided(whole_size, whole_stride).copy_(gradient)
        return laid_out.as_strided(size, stride, offset)

    return Place(get_gradient_edge(whole), part, whole_size, options)


class PlaceRecorder(Recorder):
    """Notes each point's place in the autograd graph, and keeps no activation alive.

    Autograd attaches that place only after an operation has been dispatched, and a later operation in place would
    move it; so it is taken when the next operation, or the end of the pass, comes.

    An autograd function runs its forward without gradients. If its backward runs that forward again with gradients (a
    re-entrant checkpoint, a reversible block), its points have their places in that second run. Autograd numbers its
    nodes as they are made and runs them in falling order; so the points of a function are the first of their names
    that were made after its node and have no place yet.

    Attributes:
        places: one a point, None while no gradient can arrive.
        on_place: given each point's index and place as it becomes known.
    """

    follows_weights = False  # the same kernels as in the backward pass, where checkpoints run the model again

    def __init__(self, *args: Any, on_place: Callable[[int, Place], None], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.on_place = on_place
        self.names: list[str] = []
        self.hidden: list[tuple[int, int]] = []  # the number of the next node, and the point
        self.waiting: tuple[int, Tensor, int | None] | None = None
        self.point_at: dict[Node, int] = {}
        self.unchecked = self.largest = 0

    def note_point(self, result: Tensor) -> None:
        """Note that ``result`` is a point, whose place is taken at the next operation."""
        node = running_function()
        if node is None:
            index = len(self.names)
            self.names.append(self.stack.name)
        else:
            number = sequence_number(node)
            again = ((n, i) for n, i in self.hidden if n > number and self.names[i] == self.stack.name)
            found = next(again, None)
            if found is None:
                return
            self.hidden.remove(found)
            index = found[1]
        self.waiting = index, result, next_sequence_number()
        self.point_at[self.nodes[result]] = index

    def on_sum_again(self, result: Tensor, node: Node) -> None:
        """The gradient of a point that is computed once more is what arrives at both."""
        index = self.point_at.get(node)
        if index is not None:
            self.waiting = index, result, None

    def take(self) -> None:
        """Take the place of the last point."""
        if self.waiting is None:
            return
        index, tensor, sequence = self.waiting
        self.waiting = None
        if tensor.requires_grad:
            self.on_place(index, _place_of(tensor))
        elif sequence is not None:
            self.hidden.append((sequence, index))

    def before_operation(self) -> bool:
        """Take the place of the last point."""
        self.take()
        return True

    def _run(self, name: str, func: Any, args: Sequence[Any], kwargs: dict[str, Any], active: list[Tensor]) -> Any:
        result = super()._run(name, func, args, kwargs, active)
        self._check_memory(result)
        return result

    def _check_memory(self, result: Any) -> None:
        """Stop before the activations kept for the backward pass fill the memory: the system would end the process."""
        for tensor in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(tensor, Tensor):
                nbytes = tensor.numel() * tensor.element_size()  # sparse tensors have no nbytes
                self.largest = max(self.largest, nbytes)
                self.unchecked += nbytes
        if self.unchecked > CHECK_EVERY:
            self.unchecked = 0
            free = available_memory()
            if free is not None and free < CHECK_EVERY + 2 * self.largest:
                raise MemoryError(f"{free / 2**30:.2f} GiB are free while activations are kept for the backward pass")


# The available memory is read (about 50 microseconds) each time this many bytes of results have been made; so many must
# be free beyond the two gradients of the largest activation that the backward pass holds at once.
CHECK_EVERY = 2**28


class ResidualPlaces(PlaceRecorder):
    """The points are residual additions."""

    def on_addition(self, found: Residual, operands: Sequence[Tensor], run: Callable[[], Tensor]) -> Tensor:
        """Note the sum."""
        result = run()
        self.note_point(result)
        return result


class LayerPlaces(PlaceRecorder):
    """The points are the outputs of weighted operations."""

    def on_weighted(self, x: Tensor, result: Tensor) -> None:
        """Note the output."""
        if result.dim() >= 2 and result.is_floating_point():
            self.note_point(result)


# --- the rules on gradients -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Rated:
    """A point, and the decimal logarithms of its S and G, and of S by all of the signal, what all inputs share with it.

    A step of a layer's weights acts on all that it reads, a constant offset included, unless a normalizer takes it off.
    """

    block: BlockSignal
    sensitivity: float
    power: float
    roughness: float


# Layers that are to move by their own size take √S steps if none may leave the range of the linear approximation:
# 300 steps for 10⁵, 3000 for 10⁷, which only long training pays for. See docs/signal.md for the nets measured.
ROUGH, TOO_ROUGH = 1e5, 1e6

_PLAIN = Architecture()

# The output is the largest of the last points: there may be several heads, or a gate after the last layer.
OUTPUTS = 3


def gradient_explosion(
    signal: SignalPropagation, made_of: Architecture = _PLAIN, size: Sequence[Finding] = ()
) -> Iterator[Finding]:
    """S and G grow from the output to the input: the output is too rough in what the early layers compute.

    Scales alone move one of the two: a signal that grows has gradients that grow, and S stays. What counts is the
    largest ratio to the output, or the steady growth over all points if that is more: between a map and its mean over
    all positions S jumps, for the positions of a map are correlated.

    Args:
        signal: the measurement.
        made_of: of what the model is made.
        size: the findings on the size of the signal; where it explodes, gradients beyond the precision follow from it.
    """
    broken = next((b for b in signal.blocks if b.avg_sq_gradient is not None and not isfinite(b.avg_sq_gradient)), None)
    if broken is not None and all(isfinite(b.avg_channel_var) for b in signal.blocks):
        cause = next((finding for finding in size if finding.kind == "explosion"), None)
        message, code = f"the gradient is not finite at {broken.place}, though the signal is", TRACE
        remedy = "Look for the derivative of a root, norm or logarithm at zero, and for half precision's range."
        if cause is not None:
            message += "; that follows from the explosion of the signal"
            remedy, code = f"Cure the explosion; what is left then is another matter. {cause.remedy}", cause.code
        yield Finding(
            kind="gradient_explosion",
            severity="error",
            block=broken.index,
            message=f"{message}.",
            remedy=remedy,
            code=code,
        )
        return
    points = [point for point in _rate(signal) if isfinite(point.power)]
    if len(points) < 2:
        return
    end = points[-OUTPUTS:]
    roughness, power = max(p.roughness for p in end), max(p.power for p in end)
    growth, first = max((min(p.roughness - roughness, p.power - power), -i) for i, p in enumerate(points))
    steady = min(_steady_growth([p.roughness for p in points]), _steady_growth([p.power for p in points]))
    if steady > growth:
        growth, first = steady, 0
    if growth < log10(ROUGH):
        return
    early, late = points[-first].block, end[-1].block
    steps = len(points) - 1 + first
    remedy, unit = remedies.gradient_explosion(made_of), _unit(early)
    yield Finding(
        kind="gradient_explosion",
        severity="error" if growth >= log10(TOO_ROUGH) else "warning",
        block=early.index,
        message=(
            f"gradients explode towards the input: from {late.place} back to {early.place} their power, relative to "
            f"the signal, grows by a factor of {_times(growth)}, of {_times(growth / steps)} from each measured {unit} "
            "to the one before."
        ),
        remedy=remedy.text,
        code=remedy.code,
    )


# What varies in the output comes from the layer to that part at most, but for correlations between the values of x.
FAINT, TOO_FAINT = 1e-4, 1e-6

# Where the signal fades with the gradient S stays, and what is left is G: the share of a step that reaches the layer.
WEAK, TOO_WEAK = 1e-6, 1e-9


def gradient_vanishing(
    signal: SignalPropagation,
    made_of: Architecture = _PLAIN,
    size: Sequence[Finding] = (),
    chains: Sequence[Sequence[BlockSignal]] = (),
) -> Iterator[Finding]:
    """S or G falls from the output to the input: the early layers do not learn.

    Points compare with those that their own signal comes to: of two streams beside each other, one in small units
    that a normalizer follows has a gradient as large as its signal is small. The calls of one module share its
    weights, which receive the sum: the largest counts. Where the signal fades, its gradient fades with it.

    Args:
        signal: the measurement.
        made_of: of what the model is made.
        size: the findings on the size of the signal.
        chains: the points of every path from an entry to an end; by default all points are one.
    """
    remedy = remedies.gradient_vanishing(made_of)
    fades = any(finding.kind == "attenuation" for finding in size)
    rated = {point.block.index: point for point in _rate(signal)}
    ways = chains or (signal.blocks,)
    ways = [_largest_of_each_module([rated[p.index] for p in way if p.index in rated]) for way in ways]
    for value, faint, too_faint, relative in (
        (lambda p: p.sensitivity, FAINT, TOO_FAINT, ", relative to the signal,"),
        (lambda p: p.power, WEAK, TOO_WEAK, ""),
    ):
        losses = [(_loss([value(p) for p in points]), points) for points in ways if points]
        (first, last, loss), points = max(losses, key=lambda one: one[0][2], default=((0, 0, 0.0), []))
        if loss < -log10(faint):
            continue
        early, late = points[first].block, points[last].block
        told = "to nothing at all (0 in this precision)"
        if isfinite(loss):
            pace = _times(-loss / (last - first))
            told = f"by a factor of {_times(-loss)}, of {pace} from each measured {_unit(early)} to the one before"
        follows = fades and not relative
        after = "; that follows from the attenuation of the signal" if follows else ""
        yield Finding(
            kind="gradient_vanishing",
            severity="error" if loss >= -log10(too_faint) else "warning",
            block=early.index,
            message=(
                f"gradients vanish towards the input: from {late.place} back to {early.place} their power{relative} "
                f"falls {told}{after}."
            ),
            remedy=f"Cure the attenuation first. {remedy.text}" if follows else remedy.text,
            code=remedy.code,
        )
        return


def gradient_cut_off(signal: SignalPropagation, chains: Sequence[Sequence[BlockSignal]] = ()) -> Iterator[Finding]:
    """No gradient at all arrives at the first points of a path, where one does further along: it is cut off between.

    Args:
        signal: the measurement.
        chains: the points of every path from an entry to an end; by default all points are one.
    """
    plotted = set(signal.blocks)
    for way in chains or (signal.blocks,):
        points = [point for point in way if point in plotted]
        reached = next((i for i, point in enumerate(points) if point.avg_sq_gradient is not None), 0)
        if not reached:
            continue
        yield Finding(
            kind="gradient_vanishing",
            severity="info",
            block=points[0].index,
            message=(
                f"no gradient arrives at {points[0].place} or before {points[reached].place}: a detach, torch.no_grad "
                "or a function without a derivative lies between, and what is before it learns nothing of this output."
            ),
            remedy="Nothing, if that is meant (a target network, features that stay as they are).",
            code=UNREACHED,
        )
        return


def _rate(signal: SignalPropagation) -> list[_Rated]:
    """The points that have a gradient and a signal.

    One whose gradient is 0 counts only if one after it has one, and no weight after it is 0 throughout: that lets
    nothing through until the first step has moved it.
    """
    rated = []
    zeros = [point.number for point in (*signal.blocks, *signal.layers) if point.weight_gain == 0]
    last_zero = max((number for number in zeros if number is not None), default=-1)
    for block in signal.blocks:
        gradient, variance = block.avg_sq_gradient, block.avg_channel_var
        if gradient is None or not isfinite(gradient) or not isfinite(variance) or variance <= 0:
            continue
        if gradient == 0 and block.number is not None and block.number < last_zero:
            continue
        power = _log(gradient * prod(block.shape) / block.shape[0])
        size = variance if block.renewed else variance + block.avg_channel_sq_mean
        rated.append(_Rated(block, power + log10(variance), power, power + log10(size)))
    return rated if any(isfinite(p.power) for p in rated) else []


def _largest_of_each_module(points: Sequence[_Rated]) -> list[_Rated]:
    largest: dict[str, _Rated] = {}
    for point in points:
        module = point.block.name.split("#")[0]
        if module not in largest or point.power > largest[module].power:
            largest[module] = point
    return sorted(largest.values(), key=lambda p: p.block.index)


def _steady_growth(values: Sequence[float]) -> float:
    """From the last value to the first at the typical slope; no more than what there is between any two."""
    return min(-_slope(values) * (len(values) - 1), max(values) - min(values))


def _slope(values: Sequence[float]) -> float:
    """Change from one value to the next: the median over all pairs (Theil and Sen), of 200 values at most."""
    every = max(1, len(values) // 200)
    chosen = list(enumerate(values))[::every]
    return median((b - a) / (j - i) for (i, a), (j, b) in combinations(chosen, 2)) if len(chosen) > 1 else 0.0


def _loss(values: Sequence[float]) -> tuple[int, int, float]:
    """Where all points before have far less than one after: the last of those before, the one after, the difference.

    Those before are more than a quarter of all: a network may begin with a side branch. The largest of each side
    counts, for side branches (queries and keys, gates) receive less than the way past them.
    """
    best = (0, len(values) - 1, 0.0)
    for split in range(len(values) // 4 + 1, len(values)):
        after = max(range(split, len(values)), key=lambda i: values[i])
        before = max(values[:split])
        if values[after] > before and values[after] - before > best[2]:
            best = split - 1, after, values[after] - before
    return best


def _unit(block: BlockSignal) -> str:
    return "block" if block.kind == "residual" else "layer"


def _times(exponent: float) -> str:
    """A power of ten in three digits, also where it is beyond a float's range."""
    return f"{10**exponent:.3g}" if abs(exponent) < 300 else f"1e{exponent:+.0f}"


def _log(value: float) -> float:
    return log10(value) if value > 0 else -inf
