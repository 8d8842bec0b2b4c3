"""Where a residual branch ends: the layers, or the gate or activation, that can carry its factor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from normfree.convert.dataflow import Addition, Call, Dataflow, Step
from normfree.convert.structure import Structure, changes_branch, gate_of, is_fusion
from normfree.trace import operations as op
from normfree.trace.graph import Node

HALVING = frozenset({"sigmoid", "hardsigmoid"})
"""Gates that are 1/2 where their input is zero: the factor that restores what they take is 2."""

HOMOGENEOUS = frozenset({"relu", "leaky_relu"})
"""Functions f with f(c x) = c f(x) for every c > 0."""

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
        constant: the modules carry alpha alone, and no skip gain: it would scale more than the end of the branch.
        passed: the removed norms between the modules and the addition.
        absorbing: the layers that take back what a module scales beside the end of the branch.
        problem: why no module can carry it, in words.
    """

    addition: Addition
    modules: Mapping[str, float] = field(default_factory=dict)
    learned: str = ""
    square: float = 1.0
    constant: bool = False
    passed: frozenset[str] = frozenset()
    absorbing: frozenset[str] = frozenset()
    problem: str = ""


class _Blocked(Exception):
    """The way back from an addition meets something that no factor passes."""


def endings(structure: Structure, model: nn.Module, removed: set[str], chosen: Iterable[str]) -> list[Ending]:
    """The ending of every residual branch that loses its norms, in order; sums of two resolutions are no branches.

    A module that runs once ends one branch at most; one that runs several times has to end one each time, or what else
    it gives has to go to layers that take the factor back. A module that several modules share is one in each of them.
    """
    owners = {p.untyped_storage().data_ptr(): (name, p) for name, p in model.named_parameters()}
    standardized, places = set(chosen), Places(structure.flow, model)
    additions = [
        addition
        for addition in structure.flow.additions
        if changes_branch(structure, addition, removed) and not is_fusion(structure, addition)
    ]

    def walked(addition: Addition, avoided: set[str]) -> Ending:
        try:
            return _Walk(structure, owners, removed, standardized, places, avoided, addition).ending()
        except _Blocked as blocked:
            return Ending(addition, problem=str(blocked))

    found = _fitting([walked(addition, set()) for addition in additions], structure, places, standardized)
    avoided = {name for ending in found if ending.problem for name in ending.modules}
    if not avoided:
        return [replace(ending, modules={}) if ending.problem else ending for ending in found]
    again = [walked(ending.addition, avoided) if ending.problem and ending.modules else ending for ending in found]
    second = _fitting(again, structure, places, standardized)
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


def _fitting(found: list[Ending], structure: Structure, places: Places, standardized: set[str]) -> list[Ending]:
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
                elif len(step.inputs) == 1 and step.name in _LINEAR | HOMOGENEOUS and layer is None:
                    waiting += [made for made in step.outputs if structure.flow.readers(made)]
                else:
                    return None
    return frozenset(found)


@dataclass(frozen=True)
class _Way:
    """One of the ways back from an addition, as far as it has been walked.

    Attributes:
        node: the activation it has come to, which a factor passes.
        correction: of gates on the way that no module carries yet.
        carrier: the module that carries the factor; "" before there is one.
        summed: it is added to another way.
        norm: a removed norm on the way, whose place could carry the factor; "" for none.
    """

    node: Node
    correction: float = 1.0
    carrier: str = ""
    summed: bool = False
    norm: str = ""


class _Walk:
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
        self.learned = ""

    def ending(self) -> Ending:
        self._note_learned(self.structure.flow.made_by[self.addition.output])
        waiting = [_Way(self.addition.branch)]
        while waiting:
            way = waiting.pop()
            try:
                waiting += self._behind(way)
            except _Blocked:
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
            constant=self.constant,
            passed=frozenset(self.passed),
        )

    def _behind(self, way: _Way) -> list[_Way]:
        """The ways on; none where a layer ends one. A way with a carrier goes on to find the gates before it."""
        node = way.node
        if node is self.addition.ancestor:
            raise _Blocked("it leads back to its own shortcut")
        self._check_read_once(node)
        call = self.structure.layer_at.get(node)
        if call is not None:
            return self._carried_by(call, way)
        step = self.structure.flow.made_by.get(node)
        if step is None:
            raise _Blocked("it reads the input itself")
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
            return [replace(way, node=step.inputs[0])]
        if step.name in _LINEAR or step.name == "add":
            summed = step.name == "add" if len(step.inputs) > 1 else way.summed
            return [replace(way, node=each, summed=summed) for each in step.inputs]
        return self._activated(step, way)

    def _check_read_once(self, node: Node) -> None:
        readers = {
            id(step)
            for step in self.structure.flow.readers(node)
            if any(made in self.structure.alive for made in step.outputs)
        }
        if len(readers) + (node in self.structure.flow.outputs) > 1:
            raise _Blocked("what ends it is read elsewhere, too")

    def _carry(self, module: str, correction: float) -> None:
        """Have a module carry the factor of one way."""
        if self.modules.setdefault(module, correction) != correction:
            raise _Blocked(f"{module}, which ends it, is read through gates and past them")

    def _note_source(self, way: _Way) -> None:
        """Remember what a gate gates."""
        if way.summed:
            self.sources.setdefault(way.node, []).append(way.carrier)

    def _carried_by(self, call: Call, way: _Way) -> list[_Way]:
        if way.carrier:
            self._note_source(way)
            return []
        if call.name not in self.standardized:
            raise _Blocked(f"{call.name}, which ends it, was left alone")
        self._carry(call.name, way.correction)
        return []

    def _gated(self, way: _Way, value: Node, gate: Node) -> _Way:
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
        self._carry(module, 2 * way.correction)
        return replace(way, node=value, correction=1.0, carrier=module)

    def _made_nonlinearly(self, node: Node) -> Step | None:
        step = self.structure.flow.made_by.get(node)
        while step is not None and step.name in op.VIEW and len(step.inputs) == 1:
            step = self.structure.flow.made_by.get(step.inputs[0])
        return step

    def _activated(self, step: Step, way: _Way) -> list[_Way]:
        """A branch that ends in an activation has the factor behind it: its module's, or that of a norm's place there.

        The factor of a function that is homogeneous can stand before it, but no gain that is learned: the gradient of
        one that is zero would be zero.
        """
        if way.carrier:
            return []
        if step.name in op.NONLINEAR:
            module = self._module_of(step, way.node)
            if module is not None and module not in self.avoided:
                self._carry(module, way.correction)
                return []
            if way.norm and way.norm not in self.avoided:
                self._carry(way.norm, way.correction)
                return []
        if step.name in HOMOGENEOUS and len(step.inputs) == 1:
            self.constant = True
            return [replace(way, node=step.inputs[0])]
        raise _Blocked(f"it ends in {step.name}, which no weight lies behind")

    def _module_of(self, step: Step, node: Node) -> str | None:
        """The leaf module (or removed norm with an activation) that ran an operation and gave what it made."""
        for call in self.structure.flow.calls_of.get(step.module, ()):
            if call.output is not None and (call.output is node or call.output in step.outputs):
                return self.places.of(call)
        return None

    def _note_learned(self, step: Step) -> float:
        """Note a parameter that scales the branch; its mean square, 1 where there is none."""
        square = 1.0
        for value in step.args:
            found = self.owners.get(value.untyped_storage().data_ptr()) if isinstance(value, Tensor) else None
            if found is not None:
                self.learned = found[0]
                square *= float(found[1].detach().double().square().mean())
        return square
