"""What carries a variance once the norms are gone: that of each removed norm, and the factor of each branch.

A norm gives its output unit variance, whatever its input has. Without it, one of these has to:

1. the layer directly before it, standardized: its output has unit variance;
2. the layers directly after it (``linear(norm(x))``), standardized: the scale of their input is measured;
3. the nearest layers on every path back to it, standardized, whatever is in between (rather than 2 where all of
   them are convolutions or end residual branches, which are standardized in any case);
4. an affine map in its place, with the mean and variance that the example has there (BatchNorm), where a path leads
   back to the input, a lookup, a recurrence or a weight of no known layer; for another norm a measured factor, where
   a residual stream begins with it;
5. the layers after it, where only what is homogeneous lies in between (a norm that no affine map can stand for).

A norm for which there is none of these stays, and so does one that directly follows a weight that cannot be
standardized; :func:`sort_norms` gives the reason. A residual branch is scaled by what ends it: its last layers, or the
gate or activation after them (:func:`find_endings`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Container, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from math import prod

from torch import Tensor, nn

from normfree.convert.dataflow import (
    Addition,
    Call,
    Dataflow,
    Step,
    class_name,
    factors_of,
    is_batch_norm,
    is_map_norm,
    is_norm,
    passes_unchanged,
)
from normfree.convert.norms import why_not_followed, why_unknown
from normfree.convert.structure import Structure, changes_branch, gate_of, is_fusion, unexpanded_shape, why_no_map
from normfree.trace import operations as op
from normfree.trace.graph import Node

MOST_NAMED = 4
"""Names of layers in one entry of a record: a stream has as many after it as blocks before."""


INPUT = "the input itself"


_BENDING = (
    (op.NONLINEAR - op.HOMOGENEOUS - {"maximum", "minimum"}) | op.NORM | op.ATTENTION | op.EMBEDDING | op.RECURRENT
)


_AGGREGATING = (
    frozenset({"index_add", "scatter_add", "scatter_reduce", "index_reduce", "segment_reduce"}) | op.ATTENTION
)


_FEATURES = op.NONLINEAR - op.BOUNDED_GATE - {"exp", "where", "clamp", "clamp_min", "clamp_max", "maximum", "minimum"}
"""Functions whose results are features, and not the weights of an attention."""


_PRODUCTS = op.LINEAR | {"mul", "_sparse_mm", "_sparse_addmm"}


@dataclass(frozen=True)
class Source:
    """What gives an activation its size.

    Attributes:
        names: the nearest layers (or norms) on the ways back from it, :data:`MOST_NAMED` of them at most.
        obstacle: why one of the weights on those ways cannot be standardized; "" where all can.
        past: what it comes from past any layer: the input, a lookup, a recurrence; "" where every path has a layer.
        settled: its layers are standardized, whatever answers a norm: convolutions, and those of a residual stream.
    """

    names: tuple[str, ...] = ()
    obstacle: str = ""
    past: str = ""
    settled: bool = False

    @staticmethod
    def join_sources(sources: Iterable[Source]) -> Source:
        """What gives the result of an operation on several activations its size."""
        found = list(sources)
        names = dict.fromkeys(name for source in found for name in source.names)
        return Source(
            tuple(names)[:MOST_NAMED],
            next((source.obstacle for source in found if source.obstacle), ""),
            next((source.past for source in found if source.past), ""),
            all(source.settled for source in found),
        )


@dataclass
class NormGroups:
    """The norms of a model, by what a fresh start makes of them.

    Attributes:
        removed: those it can do without, and the layers that carry each.
        between: those among them that layers before them carry past other operations.
        aggregated: those among them after an aggregation over nodes or positions: a layer may then give them a mean
            square of 1, and little of it as variance within channels, for aggregation makes nodes alike.
        affine: those an affine map stands for, and why.
        factored: those that a measured factor stands for, and why.
        kept: the others, and why.
    """

    removed: dict[str, tuple[str, ...]] = field(default_factory=dict)
    between: set[str] = field(default_factory=set)
    aggregated: set[str] = field(default_factory=set)
    affine: dict[str, str] = field(default_factory=dict)
    factored: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)


def sort_norms(structure: Structure, ways: SignalPaths, staying: Mapping[str, str]) -> NormGroups:
    """What becomes of each norm of a model in a fresh start.

    Args:
        structure: of the model.
        ways: through it.
        staying: norms that were measured to be needed, and why.
    """
    norms = NormGroups()
    for name, calls in structure.norms.items():
        if reason := staying.get(name) or _reason_to_keep(structure, ways, calls):
            norms.kept[name] = reason
            continue
        answers = [_carrier_of(structure, ways, call) for call in calls]
        if reason := next((answer.kept for answer in answers if answer.kept), ""):
            norms.kept[name] = reason
        elif reason := next((answer.affine for answer in answers if answer.affine), ""):
            if len(calls) == 1:
                norms.affine[name] = reason
            else:
                norms.kept[name] = f"it runs {len(calls)} times, and {reason}: one affine map cannot stand for all"
        elif len(calls) == 1 and (reason := answers[0].factored):
            norms.factored[name] = reason
        else:
            norms.removed[name] = tuple(dict.fromkeys(each for answer in answers for each in answer.layers))
            if any(answer.between for answer in answers):
                norms.between.add(name)
            if any(call.input in ways.aggregated for call in calls):
                norms.aggregated.add(name)
    _keep_uncarried(structure, ways, norms)
    return norms


def find_loops(structure: Structure, norms: NormGroups) -> dict[str, frozenset[str]]:
    """The modules that run on what came of their own output, and the removed norms that are or are answered by each.

    Whatever such a module gives is what it takes, so that a size that is off by a little is off by its power: it is
    not known from its first run how large it becomes.
    """
    answered: dict[str, set[str]] = {}
    for name, layers in norms.removed.items():
        for each in (name, *layers):
            answered.setdefault(each, set()).add(name)
    calls_of = structure.layers | structure.norms
    return {
        each: frozenset(names)
        for each, names in answered.items()
        if _feeds_itself(structure.flow, calls_of.get(each, []))
    }


def _feeds_itself(flow: Dataflow, calls: list[Call]) -> bool:
    """Whether what a run gave leads to what the next one takes."""
    for call, following in pairwise(calls):
        if call.output is None or following.input is None:
            continue
        seen, waiting = {following.input}, [following.input]
        while waiting:
            node = waiting.pop()
            if node is call.output:
                return True
            new = {each for each in node.parents if each.number >= call.output.number} - seen
            seen |= new
            waiting += new
    return False


def _keep_uncarried(structure: Structure, ways: SignalPaths, norms: NormGroups) -> None:
    """Have layers, or norms that stay, answer each removed norm; keep the first of those that answer one another alone.

    A norm may be answered by another: by what answers that one, if it is removed.
    """
    answers = _carriers_past_norms(norms.removed)
    while unanswered := [name for name in norms.removed if not answers[name]]:
        name = unanswered[0]
        past = next(
            (past for call in structure.norms[name] if call.input and (past := ways.source_of(call.input).past)), ""
        )
        takes = f"it takes {past}, and" if past else "before it and"
        norms.kept[name] = f"{takes} after it only norms take over, of which one has to stay"
        norms.between.discard(name)
        norms.aggregated.discard(name)
        del norms.removed[name]
        answers = _carriers_past_norms(norms.removed)
    norms.removed.update({name: layers[:MOST_NAMED] for name, layers in answers.items()})


def _carriers_past_norms(removed: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """What answers each removed norm, none of it a removed norm; nothing for those that answer one another alone."""
    found: dict[str, tuple[str, ...]] = {}
    for name in removed:
        seen, waiting, last = {name}, list(removed[name]), dict[str, None]()
        while waiting:
            answer = waiting.pop(0)
            if answer not in removed:
                last[answer] = None
            elif answer not in seen:
                seen.add(answer)
                waiting += removed[answer]
        found[name] = tuple(last)
    return found


@dataclass(frozen=True)
class _Carrier:
    """What carries the variance at one place of a norm; ``kept`` says why nothing can.

    A norm that runs once gets a factor in its place where ``factored`` says why, whatever layers could take over.
    """

    layers: tuple[str, ...] = ()
    between: bool = False
    affine: str = ""
    factored: str = ""
    kept: str = ""


def _carrier_of(structure: Structure, ways: SignalPaths, call: Call) -> _Carrier:
    assert call.input is not None and call.output is not None, "a norm that is not followed stays"
    before = structure.producing_layer(call.input, alone=False)
    if before is not None:
        return _Carrier((before.name,))
    source = ways.source_of(call.input)
    carried = not source.obstacle and not source.past
    if carried and source.settled:
        return _Carrier(source.names, between=True)
    if source.past != INPUT and (consumers := ways.consuming_layers(call.output)):
        return _Carrier(consumers)
    if carried:
        return _Carrier(source.names, between=True)
    reason = f"it takes {source.past}" if source.past else source.obstacle
    if is_batch_norm(call.module):
        return _Carrier(affine=reason)
    if source.past == INPUT and not source.names and not source.obstacle:
        alone = ", each example by itself" if is_norm(call.module) else ""
        return _Carrier(kept=f"it gives the input its units{alone}")
    absorbing = ways.absorbing.get(call.output, ())
    if not absorbing:
        return _Carrier(kept=f"{reason}, and no layer after it takes over")
    # A residual stream of another size than its branches, which are scaled to alpha, would drown or be drowned.
    begins = any(call.output in (addition.ancestor, addition.shortcut) for addition in structure.flow.additions)
    return _Carrier(absorbing, factored=f"{reason}, and begins a residual stream" if begins else "")


def _reason_to_keep(structure: Structure, ways: SignalPaths, calls: list[Call]) -> str:
    """Why a norm stays, whatever else could carry its variance; "" for no reason."""
    if unknown := why_unknown(structure.flow, calls[0]):
        return unknown
    if reason := why_not_followed(calls):
        return reason
    producers = [structure.producing_layer(call.input, alone=False) for call in calls]
    by_convolution = all(call is not None and structure.is_convolution(call) for call in producers)
    if not _is_convolutional(structure, calls) and not by_convolution and any(map(ways.is_near_attention, calls)):
        return "it stands between linear and attention layers, not after a convolution"
    direct = next((call.name for call in producers if call is not None and structure.obstacles[call.name]), None)
    if direct is not None:
        return structure.obstacles[direct]
    return next((reason for call in calls if (reason := unknown_weight(structure, call))), "")


def _is_convolutional(structure: Structure, calls: list[Call]) -> bool:
    """Whether a norm is one of convolutional networks: of torch's classes, with statistics, or of maps [N, C, …, …]."""
    name, module, node = calls[0].name, calls[0].module, calls[0].input
    if is_norm(module):
        return is_map_norm(module)
    is_map = node is not None and len(structure.flow.shapes[node]) > 3 and node.note.axis == 1
    return name in structure.constants or is_map


def unknown_weight(structure: Structure, call: Call) -> str:
    """Why a norm stays directly after a weight that is no layer's we know; "" where it is not."""
    node, flow = call.input, structure.flow
    while node is not None and node not in structure.layer_at:
        step = flow.made_by.get(node)
        if step is None:
            return ""
        if _is_unknown_weight(step):
            return _unknown(flow, step)
        node = step.inputs[0] if passes_unchanged(step) else None
    return ""


def _is_unknown_weight(step: Step) -> bool:
    return step.name in op.CONVOLUTION or (
        step.name in op.LINEAR and step.outputs[0].step.weighted > 0 and step.learned
    )


def _unknown(flow: Dataflow, step: Step) -> str:
    known = why_no_map(flow, step.module) or f"computes {op.plain_name(step.name)} with no weight of its own"
    return f"{step.module or 'the model'} before it {known}"


class SignalPaths:
    """What lies on the ways through a dataflow, found in one pass over it in each direction.

    Args:
        structure: of the model.
        layers: the layers that take over what comes to them; those that can be standardized by default.
    """

    def __init__(self, structure: Structure, layers: Container[str] | None = None) -> None:
        self.structure, self.flow = structure, structure.flow
        able = {name for name, obstacle in structure.obstacles.items() if not obstacle}
        self.layers: Container[str] = able if layers is None else layers
        self.sources: dict[Node, Source] = {}
        self.outputs = set(self.flow.outputs)
        self.sums = {addition.output for addition in self.flow.additions}
        self.weighted: set[Node] = set()
        self.attending: set[int] = set()
        self.scores: dict[Node, frozenset[int]] = {}
        self.aggregated: set[Node] = set()
        self._forwards()

    def is_near_attention(self, call: Call) -> bool:
        """Whether attention lies on a way to a norm or on from it."""
        return call.input in self.after_attention or call.output in self.before_attention

    def consuming_layers(self, node: Node) -> tuple[str, ...]:
        """The layers all of which read an activation at once, but for its layout, and nothing else does; else none."""
        found: dict[str, None] = {}
        waiting = [node]
        while waiting:
            current = waiting.pop()
            readers = self.flow.readers(current)
            if not readers or current in self.flow.outputs:
                return ()
            for step in readers:
                owner = self.structure.layer_of(step)
                if owner is not None and owner in self.layers:
                    found[owner] = None
                elif passes_unchanged(step):
                    waiting += step.outputs
                else:
                    return ()
        return tuple(found)

    def _forwards(self) -> None:
        for step in self.flow.steps:
            values = self.carried_values(step)
            source = self._source(step, values)
            aggregates = step.name in _AGGREGATING or (step.name in _PRODUCTS - {"mul"} and not step.learned)
            if aggregates or any(each in self.aggregated for each in step.inputs):
                self.aggregated.update(step.outputs)
            for node in step.outputs:
                self.sources[node] = self._at_place(node, source)
                if step.learned or any(each in self.weighted for each in values):
                    self.weighted.add(node)
            self._find_attention(step)

    def _find_attention(self, step: Step) -> None:
        """Attention is an operation of that name, or two products: what one makes of two activations weights a third.

        Both activations of a product were made with weights. The first alone (interactions of features, bilinear
        pooling) is no attention, nor is one whose result an activation function, or a layer, makes into features.
        """
        factors = [node for node in step.inputs if node not in self.flow.numbers][-2:]
        multiplies = step.name in op.LINEAR and sum(map(self._is_weighted, factors)) > 1
        before = frozenset[int]().union(*(self.scores.get(node, ()) for node in step.inputs))
        if step.name in op.ATTENTION:
            self.attending.add(step.number)
        elif multiplies and before:
            self.attending |= before | {step.number}
        if multiplies:
            before = frozenset({step.number})
        elif step.learned or step.name in _FEATURES:
            before = frozenset()
        if before:
            self.scores.update(dict.fromkeys(step.outputs, before))

    def carried_values(self, step: Step) -> list[Node]:
        """The activations whose values an operation carries on; not its indices, masks, gates and coefficients."""
        nodes = [node for node in dict.fromkeys(step.inputs) if node not in self.flow.numbers]
        if gated := gate_of(self.flow, step):
            return [gated[0]]
        if len(nodes) > 1 and step.name in _PRODUCTS:
            return [node for node in nodes if self._is_weighted(node)] or nodes
        if len(nodes) > 1 and step.name in ("add", "sub"):  # a side input that is broadcast shifts, and carries nothing
            sizes = [prod(unexpanded_shape(self.flow, node)) for node in nodes]
            return [node for node, size in zip(nodes, sizes, strict=True) if size == max(sizes)]
        return nodes

    def _is_weighted(self, node: Node) -> bool:
        """Whether a parameter has had a part in an activation."""
        if node in self.flow.made_by or not node.parents:
            return node in self.weighted
        return any(map(self._is_weighted, node.parents))

    def _source(self, step: Step, values: list[Node]) -> Source:
        if step.name in op.EMBEDDING:
            return Source(past="a lookup")
        if step.name in op.RECURRENT:
            return Source(past="a recurrent layer")
        if _is_unknown_weight(step):
            return Source(obstacle=_unknown(self.flow, step))
        return Source.join_sources(map(self.source_of, values))

    def source_of(self, node: Node) -> Source:
        """What gives an activation its size."""
        if node not in self.sources:  # an input, or what was written through a view
            parents = [each for each in node.parents if each.parents]
            self.sources[node] = Source.join_sources(map(self.source_of, parents)) if parents else Source(past=INPUT)
        return self.sources[node]

    def _at_place(self, node: Node, source: Source) -> Source:
        """The source of an activation: the layer that made it, or the norm that would not pass its input's on."""
        if (layer := self.structure.layer_at.get(node)) is not None:
            obstacle = self.structure.obstacles[layer.name]
            return (
                Source(obstacle=obstacle)
                if obstacle
                else Source((layer.name,), settled=self.structure.is_convolution(layer))
            )
        if (norm := self.structure.norm_at.get(node)) is not None and norm.input is not None:
            before = self.source_of(norm.input)
            return Source((norm.name,)) if before.past or before.obstacle else before
        return replace(source, settled=True) if node in self.sums else source

    @cached_property
    def after_attention(self) -> set[Node]:
        """The activations that attention leads to."""
        found: set[Node] = set()
        for step in self.flow.steps:
            if step.number in self.attending or any(node in found for node in step.inputs):
                found.update(step.outputs)
        return found

    @cached_property
    def before_attention(self) -> set[Node]:
        """The activations that lead to attention."""
        found: set[Node] = set()
        for step in reversed(self.flow.steps):
            if step.number in self.attending or any(node in found for node in step.outputs):
                found.update(step.inputs)
        return found

    @cached_property
    def _last(self) -> set[str]:
        """The layers whose output is the model's."""
        return {
            name for name, calls in self.structure.layers.items() if any(call.output in self.outputs for call in calls)
        }

    @cached_property
    def absorbing(self) -> dict[Node, tuple[str, ...]]:
        """For an activation all readers of which lead to layers that take over, past what is homogeneous: those layers.

        Norms take over, too: those that go are answered for themselves. An activation that reaches an output, or a
        function that is not homogeneous, is not among them.
        """
        found: dict[Node, tuple[str, ...]] = {}
        for step in reversed(self.flow.steps):
            for node in step.outputs:
                readers = self.flow.readers(node)
                reached = [self._absorbed_by(each, node, found) for each in readers]
                if reached and node not in self.outputs and all(each is not None for each in reached):
                    names = dict.fromkeys(name for each in reached if each for name in each)
                    found[node] = tuple(names)[:MOST_NAMED]
        return found

    def _absorbed_by(self, step: Step, node: Node, found: dict[Node, tuple[str, ...]]) -> tuple[str, ...] | None:
        """The layers that take over what an operation reads; None where something shows it as it is."""
        if node in self.flow.numbers:
            return ()
        if (norm := self.structure.norm_of(step)) is not None:
            return (norm,)
        if (layer := self.structure.layer_of(step)) is not None:
            # A last layer would give what it reads another size: logits of another than the original's.
            return (layer,) if layer in self.layers and layer not in self._last else None
        if (gated := gate_of(self.flow, step)) is not None and gated[1] is node:
            return ()
        if step.name in _BENDING or _is_unknown_weight(step):
            return None
        used = [made for made in step.outputs if self.flow.readers(made) or made in self.outputs]
        if not used or any(made not in found for made in used):
            return None
        return tuple(name for made in used for name in found[made])


def uncarried_norms(structure: Structure, norms: NormGroups, changed: Container[str]) -> list[str]:
    """The removed norms none of whose answers is among the modules that were changed (or norms that stay)."""
    stays = set(norms.kept)
    return [
        f"{name} ({class_name(structure.norms[name][0].module)})"
        for name, layers in norms.removed.items()
        if not any(layer in changed or layer in stays for layer in layers)
    ]


HALVING = frozenset({"sigmoid", "hardsigmoid"})
"""Gates that are 1/2 where their input is zero: the factor that restores what they take is 2."""


# Linear without mixing channels: a factor of the input is a factor of the output.
_LINEAR = op.VIEW | op.PARTIAL | frozenset({"avg_pool2d", "_adaptive_avg_pool2d", "cat", "constant_pad_nd", "roll"})


@dataclass(frozen=True)
class Ending:
    """What ends one residual branch.

    Attributes:
        addition: where it is added.
        modules: names of the modules that carry its factor, and what each restores of gates: 2 for each sigmoid's;
            none where ``problem`` says why.
        learned: name of a parameter of the branch's own that scales it, and so stands for the skip gain; "" for none.
        square: mean square of that parameter, 1 for none, or where the addition itself applies it.
        factor: size of the constant factors that the model's own code has after the modules; they count towards alpha.
        constant: the modules carry alpha alone, and no skip gain: it would scale more than the end of the branch.
        passed: the removed norms between the modules and the addition.
        absorbing: the layers that take back what a module scales beside the end of the branch.
        problem: why no module can carry it, in words.
    """

    addition: Addition
    modules: Mapping[str, float] = field(default_factory=dict)
    learned: str = ""
    square: float = 1.0
    factor: float = 1.0
    constant: bool = False
    passed: frozenset[str] = frozenset()
    absorbing: frozenset[str] = frozenset()
    problem: str = ""

    def alpha(self, whole: float) -> float:
        """The factor of the modules by which the branch has ``whole``, or its own factor where that is less."""
        return min(1.0, whole / self.factor) if self.factor else whole


class _BlockedError(Exception):
    """The way back from an addition meets something that no factor passes."""


def find_endings(
    structure: Structure,
    model: nn.Module,
    removed: set[str],
    chosen: Iterable[str],
    branches: Container[Node],
    replaced: Collection[str],
) -> list[Ending]:
    """The ending of every residual branch to be scaled, in order; sums of two resolutions are no branches.

    Those are the branches that lose their norms, also to constants in their places (``replaced``), and those without
    any whose sums are ``branches``.

    A module that runs once ends one branch at most; one that runs several times has to end one each time, or what else
    it gives has to go to layers that take the factor back. A module that several modules share is one in each of them.
    """
    owners = {p.untyped_storage().data_ptr(): (name, p) for name, p in model.named_parameters()}
    standardized, places = set(chosen), Places(structure.flow, model)
    additions = [
        addition
        for addition in structure.flow.additions
        if addition.output in branches
        or (changes_branch(structure, addition, removed.union(replaced)) and not is_fusion(structure, addition))
    ]

    def walk(addition: Addition, avoided: set[str]) -> Ending:
        try:
            return _BranchWalk(structure, owners, removed, standardized, places, avoided, addition).find_ending()
        except _BlockedError as blocked:
            return Ending(addition, problem=str(blocked))

    found = _check_endings([walk(addition, set()) for addition in additions], structure, places, standardized)
    avoided = {name for ending in found if ending.problem for name in ending.modules}
    if not avoided:
        return [replace(ending, modules={}) if ending.problem else ending for ending in found]
    again = [walk(ending.addition, avoided) if ending.problem and ending.modules else ending for ending in found]
    second = _check_endings(again, structure, places, standardized)
    return [
        replace(new, modules={}, problem=old.problem or new.problem) if new.problem else new
        for old, new in zip(found, second, strict=True)
    ]


class Places:
    """The modules of a model by where they stand: one that several modules hold is one in each of them.

    Args:
        flow: of the model.
        model: the model.
    """

    def __init__(self, flow: Dataflow, model: nn.Module) -> None:
        held = Counter(child for module in model.modules() for child in module._modules.values() if child is not None)
        self.shared = {name for name, calls in flow.calls_of.items() if held[calls[0].module] > 1}
        self.calls: dict[str, list[Call]] = {}
        for call in flow.calls:
            if (place := self.of(call)) is not None:
                self.calls.setdefault(place, []).append(call)

    def of(self, call: Call) -> str | None:
        """The name of the place a module ran in; None where it cannot be exchanged there alone."""
        return call.name if call.name not in self.shared else call.place or None


def _check_endings(found: list[Ending], structure: Structure, places: Places, standardized: set[str]) -> list[Ending]:
    """The endings; with the problem those whose modules cannot carry one more factor, or not the same each time."""
    ends = Counter(name for ending in found for name in ending.modules)
    runs = {name: len(calls) for name, calls in (structure.flow.calls_of | places.calls).items()}
    last = {ending.addition.branch for ending in found}
    taken: dict[str, list[tuple[str, float]]] = {}
    fitting = []
    for ending in found:
        problem, absorbing = ending.problem, frozenset[str]()
        for name, correction in ending.modules.items():
            before = taken.get(name, [])
            if ends[name] < runs[name]:
                taking = _absorbing_layers(structure, places.calls.get(name, ()), last, standardized)
                if taking is None or name in structure.layers or correction != 1:
                    problem = f"{name}, which ends it, does so not each time it runs"
                else:
                    absorbing |= taking
            elif len(before) == runs[name]:
                problem = f"{name} ends the branch of {before[0][0] or 'the model'} already"
            elif before and before[0][1] != correction:
                problem = f"{name}, which ends it, is read through gates and past them"
        if not problem:
            for name, correction in ending.modules.items():
                taken.setdefault(name, []).append((ending.addition.name, correction))
        constant = ending.constant or bool(absorbing)
        fitting.append(replace(ending, problem=problem, absorbing=absorbing, constant=constant))
    return fitting


def _absorbing_layers(
    structure: Structure, calls: Iterable[Call], last: set[Node], standardized: set[str]
) -> frozenset[str] | None:
    """The standardized layers that read what a module gives where it ends no branch; None if anything else does.

    Between the two may be what is homogeneous and reads nothing else: a factor there is one of the layers' input.
    """
    found = set[str]()
    for call in calls:
        if call.output is None:
            return None
        waiting = [] if call.output in last else [call.output]
        while waiting:
            node = waiting.pop()
            readers = structure.flow.readers(node)
            if not readers or node in structure.flow.outputs:
                return None
            for step in readers:
                layer = structure.layer_of(step)
                if layer in standardized:
                    assert layer is not None
                    found.add(layer)
                elif len(step.inputs) == 1 and step.name in _LINEAR | op.HOMOGENEOUS and layer is None:
                    waiting += [made for made in step.outputs if structure.flow.readers(made)]
                else:
                    return None
    return frozenset(found)


@dataclass(frozen=True)
class _Path:
    """One of the ways back from an addition, as far as it has been walked.

    Attributes:
        node: the activation it has come to, which a factor passes.
        factor: of the constants on the way.
        correction: of gates on the way that no module carries yet.
        carrier: the module that carries the factor; "" before there is one.
        summed: it is added to another way.
        norm: a removed norm on the way, whose place could carry the factor; "" for none.
    """

    node: Node
    factor: float = 1.0
    correction: float = 1.0
    carrier: str = ""
    summed: bool = False
    norm: str = ""


class _BranchWalk:
    """One walk back from an addition, on all ways at once."""

    def __init__(
        self,
        structure: Structure,
        owners: Mapping[int, tuple[str, Tensor]],
        removed: set[str],
        standardized: set[str],
        places: Places,
        avoided: set[str],
        addition: Addition,
    ) -> None:
        self.structure, self.owners, self.removed = structure, owners, removed
        self.standardized, self.addition = standardized, addition
        self.places, self.avoided = places, avoided
        self.constant = False
        self.passed = set[str]()
        self.modules: dict[str, float] = {}
        self.sources: dict[Node, list[str]] = {}
        self.square = 1.0
        self.factors = list[float]()
        self.learned = ""

    def find_ending(self) -> Ending:
        last = self.structure.flow.made_by[self.addition.output]
        self._note_learned(last)
        waiting = [_Path(self.addition.branch, self._constant_factor(last, self.addition.branch))]
        while waiting:
            way = waiting.pop()
            try:
                waiting += self._before(way)
            except _BlockedError:
                if not way.carrier:
                    raise
                self._note_source(way)
        for carriers in self.sources.values():  # gates of one activation, summed: their halves add up
            for carrier in carriers:
                self.modules[carrier] /= len(carriers)
        return Ending(
            self.addition,
            self.modules,
            self.learned,
            self.square,
            max(self.factors, default=1.0),
            constant=self.constant,
            passed=frozenset(self.passed),
        )

    def _before(self, way: _Path) -> list[_Path]:
        """The ways on; none where a layer ends one. A way with a carrier goes on to find the gates before it."""
        node = way.node
        if node is self.addition.ancestor:
            raise _BlockedError("it leads back to its own shortcut")
        self._check_read_once(node)
        call = self.structure.layer_at.get(node)
        if call is not None:
            return self._carried_by(call, way)
        step = self.structure.flow.made_by.get(node)
        if step is None:
            raise _BlockedError("it reads the input itself")
        if self.structure.is_plain_norm(node, self.removed):
            norm = self.structure.norm_at[node]
            assert norm.input is not None
            self.passed.add(norm.name)
            once = len(self.structure.norms[norm.name]) == 1
            return [replace(way, node=norm.input, norm=norm.name if once and not way.norm else way.norm)]
        gated = gate_of(self.structure.flow, step)
        if gated is not None:
            return [self._gated(way, *gated)]
        if step.name in op.SCALING and len(step.inputs) == 1:
            self.square *= self._note_learned(step)
            return [replace(way, node=step.inputs[0], factor=way.factor * self._constant_factor(step, step.inputs[0]))]
        if step.name in _LINEAR or step.name == "add":
            summed = step.name == "add" if len(step.inputs) > 1 else way.summed
            return [replace(way, node=each, summed=summed) for each in step.inputs]
        return self._activated(step, way)

    def _check_read_once(self, node: Node) -> None:
        readers = set[str | int]()
        for step in self.structure.flow.readers(node):
            if any(made in self.structure.alive for made in step.outputs):
                norm = self.structure.norm_of(step)
                readers.add(norm if norm is not None and norm in self.removed else id(step))  # gone, all it computes
        if len(readers) + (node in self.structure.flow.outputs) > 1:
            raise _BlockedError("what ends it is read elsewhere, too")

    def _carry(self, module: str, correction: float, way: _Path) -> None:
        """Have a module carry the factor of one way."""
        self.factors.append(way.factor)
        if self.modules.setdefault(module, correction) != correction:
            raise _BlockedError(f"{module}, which ends it, is read through gates and past them")

    def _note_source(self, way: _Path) -> None:
        """Remember what a gate gates."""
        if way.summed:
            self.sources.setdefault(way.node, []).append(way.carrier)

    def _carried_by(self, call: Call, way: _Path) -> list[_Path]:
        if way.carrier:
            self._note_source(way)
            return []
        if call.name not in self.standardized:
            raise _BlockedError(f"{call.name}, which ends it, was left alone")
        self._carry(call.name, way.correction, way)
        return []

    def _gated(self, way: _Path, value: Node, gate: Node) -> _Path:
        """Put the factor on the gate, if a module of its own makes it; else on what is gated."""
        step = self._made_nonlinearly(gate)
        if step is None or step.name not in HALVING:
            return replace(way, node=value)
        if way.carrier:
            self.modules[way.carrier] *= 2
            return replace(way, node=value)
        module = self._module_of(step, gate)
        if module is None or len(self.places.calls[module]) > 1:
            return replace(way, node=value, correction=2 * way.correction)
        self._carry(module, 2 * way.correction, way)
        return replace(way, node=value, correction=1.0, carrier=module)

    def _made_nonlinearly(self, node: Node) -> Step | None:
        step = self.structure.flow.made_by.get(node)
        while step is not None and step.name in op.VIEW and len(step.inputs) == 1:
            step = self.structure.flow.made_by.get(step.inputs[0])
        return step

    def _activated(self, step: Step, way: _Path) -> list[_Path]:
        """A branch that ends in an activation has the factor after it: its module's, or that of a norm's place there.

        The factor of a function that is homogeneous can stand before it, but no gain that is learned: the gradient of
        one that is zero would be zero.
        """
        if way.carrier:
            return []
        if step.name in op.NONLINEAR:
            module = self._module_of(step, way.node)
            if module is not None and module not in self.avoided:
                self._carry(module, way.correction, way)
                return []
            if way.norm and way.norm not in self.avoided:
                self._carry(way.norm, way.correction, way)
                return []
        if step.name in op.HOMOGENEOUS and len(step.inputs) == 1:
            self.constant = True
            return [replace(way, node=step.inputs[0])]
        raise _BlockedError(f"it ends in {op.plain_name(step.name)}, which no weight follows")

    def _module_of(self, step: Step, node: Node) -> str | None:
        """The leaf module (or removed norm with an activation) that ran an operation and gave what it made."""
        for call in self.structure.flow.calls_of.get(step.module, ()):
            if call.output is not None and (call.output is node or call.output in step.outputs):
                return self.places.of(call)
        return None

    def _constant_factor(self, step: Step, node: Node) -> float:
        """The size of the constant with which an activation enters an operation; 1 for a parameter, or none."""
        learned = any(isinstance(v, Tensor) and v.untyped_storage().data_ptr() in self.owners for v in step.args)
        factors = None if learned else factors_of(step)
        found = dict(zip(step.inputs, factors, strict=False)) if factors else {}
        return abs(found.get(node, 1.0))

    def _note_learned(self, step: Step) -> float:
        """Note a parameter that scales the branch; its mean square, 1 where there is none."""
        square = 1.0
        for value in step.args:
            found = self.owners.get(value.untyped_storage().data_ptr()) if isinstance(value, Tensor) else None
            if found is not None:
                self.learned = found[0]
                square *= float(found[1].detach().double().square().mean())
        return square
