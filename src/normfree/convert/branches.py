"""Where a residual branch ends: the layers, or the gate or activation, that can carry its factor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from normfree.convert.dataflow import Addition, Call, Step
from normfree.convert.kinds import activation_in
from normfree.convert.structure import Structure, changes_branch, gate_of
from normfree.signal import operations as op
from normfree.signal.graph import Node

HALVING = frozenset({"sigmoid", "hardsigmoid"})
"""Gates that are 1/2 where their input is zero: the factor that restores what they take is 2."""

# Linear without mixing channels: a factor of the input is a factor of the output.
_LINEAR = op.VIEW | op.PARTIAL | frozenset({"avg_pool2d", "_adaptive_avg_pool2d", "cat", "constant_pad_nd", "roll"})


@dataclass(frozen=True)
class Ending:
    """What ends one residual branch.

    Attributes:
        addition: where it is added.
        modules: names of the modules that carry its factor; none where ``problem`` says why.
        correction: what restores a gate: 2 for a sigmoid's.
        learned: name of a parameter of the branch's own that scales it, and so stands for the skip gain; "" for none.
        square: mean square of that parameter, 1 for none.
        problem: why no module can carry it, in words.
    """

    addition: Addition
    modules: tuple[str, ...] = ()
    correction: float = 1.0
    learned: str = ""
    square: float = 1.0
    problem: str = ""


class _Blocked(Exception):
    """The way back from an addition meets something that no factor passes."""


def endings(structure: Structure, model: nn.Module, removed: set[str], chosen: Iterable[str]) -> list[Ending]:
    """The ending of every residual branch that loses its norms, in order; each module ends one branch at most."""
    owners = {p.untyped_storage().data_ptr(): (name, p) for name, p in model.named_parameters()}
    found, taken, standardized = [], dict[str, str](), set(chosen)
    for addition in structure.flow.additions:
        if not changes_branch(structure, addition, removed):
            continue
        try:
            ending = _Walk(structure, owners, removed, standardized, addition).ending()
            again = next((name for name in ending.modules if name in taken), None)
            if again is not None:
                raise _Blocked(f"{again} ends the branch of {taken[again]} already")
            taken |= dict.fromkeys(ending.modules, addition.name)
        except _Blocked as blocked:
            ending = Ending(addition, problem=str(blocked))
        found.append(ending)
    return found


class _Walk:
    """One walk back from an addition."""

    def __init__(
        self,
        structure: Structure,
        owners: Mapping[int, tuple[str, Tensor]],
        removed: set[str],
        standardized: set[str],
        addition: Addition,
    ) -> None:
        self.structure, self.owners, self.removed = structure, owners, removed
        self.standardized, self.addition = standardized, addition
        self.modules: dict[str, None] = {}
        self.correction = self.square = 1.0
        self.learned = ""

    def ending(self) -> Ending:
        waiting = [self.addition.branch]
        while waiting:
            waiting += self._behind(waiting.pop())
        return Ending(self.addition, tuple(self.modules), self.correction, self.learned, self.square)

    def _behind(self, node: Node) -> list[Node]:
        """What lies behind an activation that a factor passes; or note the module that carries it."""
        if node is self.addition.ancestor:
            raise _Blocked("it leads back to its own shortcut")
        self._check_read_once(node)
        call = self.structure.layer_at.get(node)
        if call is not None:
            return self._carried_by(call)
        norm = self.structure.norm_at.get(node)
        step = self.structure.flow.made_by.get(node)
        if step is None:
            raise _Blocked("it reads the input itself")
        if norm is not None and norm.name in self.removed and not activation_in(norm.module):
            assert norm.input is not None
            return [norm.input]
        gated = gate_of(self.structure.flow, step)
        if gated is not None:
            return self._gated(*gated)
        if step.name in op.SCALING and len(step.inputs) == 1:
            self._note_learned(step)
            return [step.inputs[0]]
        if step.name in _LINEAR or step.name == "add":
            return list(step.inputs)
        return self._activated(step, node)

    def _check_read_once(self, node: Node) -> None:
        readers = {
            id(step)
            for step in self.structure.flow.readers(node)
            if any(made in self.structure.alive for made in step.outputs)
        }
        if len(readers) > 1:
            raise _Blocked("what ends it is read elsewhere, too")

    def _carried_by(self, call: Call) -> list[Node]:
        if call.name not in self.standardized:
            raise _Blocked(f"{call.name}, which ends it, was left alone")
        if len(self.structure.layers[call.name]) > 1:
            raise _Blocked(f"{call.name}, which ends it, is used several times")
        self.modules[call.name] = None
        return []

    def _gated(self, value: Node, gate: Node) -> list[Node]:
        """Put the factor on the gate, if a module of its own makes it; else on what is gated."""
        step = self._made_nonlinearly(gate)
        if step is None or step.name not in HALVING:
            return [value]
        self.correction *= 2
        module = self._module_of(step, gate)
        if module is None or self.modules:
            return [value]
        self.modules[module] = None
        return []

    def _made_nonlinearly(self, node: Node) -> Step | None:
        step = self.structure.flow.made_by.get(node)
        while step is not None and step.name in op.VIEW and len(step.inputs) == 1:
            step = self.structure.flow.made_by.get(step.inputs[0])
        return step

    def _activated(self, step: Step, node: Node) -> list[Node]:
        """A branch that ends in an activation's module has the factor behind it."""
        if step.name in op.NONLINEAR and (module := self._module_of(step, node)) is not None:
            self.modules[module] = None
            return []
        raise _Blocked(f"it ends in {step.name}, which no weight lies behind")

    def _module_of(self, step: Step, node: Node) -> str | None:
        """The leaf module (or removed norm with an activation) that ran an operation, if it ran once."""
        calls = [call for call in self.structure.flow.calls if call.name == step.module]
        if len(calls) != 1 or calls[0].output is None:
            return None
        return step.module if calls[0].output is node or calls[0].output in step.outputs else None

    def _note_learned(self, step: Step) -> None:
        for value in step.args:
            found = self.owners.get(value.untyped_storage().data_ptr()) if isinstance(value, Tensor) else None
            if found is not None:
                self.learned = found[0]
                self.square *= float(found[1].detach().double().square().mean())
