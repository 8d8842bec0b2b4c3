"""Which activations of one forward pass are measured: residual additions, and the weighted layers beside them.

A weighted layer inside a residual block is measured with its block, as the branch and the sum. All others are points
of their own: before the first block, between blocks, after the last, in heads and in further streams. Whether a
layer lies inside a block is known once the block's addition has run, when its output is gone. So layers are measured
unless the layer of that name in a module of that class lay inside a block before; what that leaves out wrongly is named
by :meth:`PointRecorder.finish`, for a second pass.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from normfree.signal.architecture import Architecture, Layer, Seen, Weights, ancestors, architecture_of, title_of
from normfree.signal.moments import Moments, Sizes, channel_moments, channel_sizes
from normfree.signal.propagation import Position
from normfree.trace import operations as op
from normfree.trace.graph import Additions, Node, Path, Residual
from normfree.trace.operations import likely_axis
from normfree.trace.recorder import Note, Recorder

# A bottleneck passes 3 weighted operations, an inverted one with squeeze-excite 5, attention 2, the longest blocks in
# use 9 (HGNet). What is longer, or goes back to a higher resolution, is a network of its own beside a long skip
# (DnCNN's 20 layers, a U-Net), and its layers are points of their own.
LONGEST_BRANCH = 10


@dataclass(frozen=True, kw_only=True)
class Point(Position):
    """One measured point: where a stream begins, a residual addition, a weighted layer, or an output.

    Attributes:
        output: moments of the activation.
        branch: moments of the branch before it was scaled and added.
        activated: moments of the sum after the activation that alone reads it.
    """

    output: Moments
    branch: Moments | None = None
    activated: Moments | None = None


@dataclass
class Recording:
    """What one forward pass gave.

    Attributes:
        entry: the input of the first block, or of the first layer.
        points: what is plotted: the residual additions, or all weighted layers.
        layers: beside residual additions, the weighted layers that are in no block.
        outputs: what the model returned, where it is a floating-point activation.
        entries: where streams begin.
        architecture: what the model is made of.
        unmeasured: names of the layers that no value of the batch came to, or that did not run.
    """

    entry: Point | None = None
    points: list[Point] = field(default_factory=list)
    layers: list[Point] = field(default_factory=list)
    outputs: list[Point] = field(default_factory=list)
    entries: list[Point] = field(default_factory=list)
    architecture: Architecture = field(default_factory=Architecture)
    unmeasured: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class PassResult:
    """What one pass found that the next must know.

    Attributes:
        layers: numbers of the weighted layers to measure.
        woken: names of the zero gains to be set to one.
        refused: numbers of the sums that are not residual, whatever they look like.
    """

    layers: frozenset[int]
    woken: tuple[str, ...] = ()
    refused: frozenset[int] = frozenset()
    complete: bool = True
    """Whether the pass has measured all that there is, as it is to be measured."""


@dataclass(eq=False)
class _Visit:
    """One weighted layer or residual addition, measured or not.

    Attributes:
        number: how many there were before it.
        name: module that ran it.
        node: its place in the graph.
        source: what was known of the activation that its signal comes from.
        point: its measurement.
        sum, layer: its number among the residual additions, or among the weighted layers.
        branch: of a residual addition, the branch's place.
        inside: it is a layer inside a block.
    """

    number: int
    name: str
    node: Node
    source: Note
    point: Point | None
    sum: int | None = None
    layer: int | None = None
    branch: Node | None = None
    inside: bool = False


class PointRecorder(Recorder):
    """Measures residual additions with their branches, weighted layers outside blocks, and outputs.

    Args:
        model: the model that will run.
        points: "residual", or "layers" for all weighted layers and no residual addition.
        earlier: what the pass before found; None for the first.
        args, options: of :class:`Recorder`.

    Attributes:
        recording: what is measured.
        received: until the first addition, what each container was given.
        inside_of: of each kind of module, where in it layers lie that are inside blocks.
        visits: the additions and layers that were come by, in their order.
        summed, layer_at: those of them by their activation.
        entry_of: of each stream and kind of point, the number of its entry.
        activated: of an addition that an activation alone reads, its moments after that.
        made, layers_seen, branches_seen, operations, renewals: what the architecture, and chains, are made of.
        inputs_seen: of layers that read an input, how large its channels are.
        operation: the one that is running, with its arguments.
        last_bent, bent_in: the last activation function, and how many each module ran.
        ran, emptied: the modules in which an operation ran on activations, and on tensors without values.
        unread: the parameters that no operation but a view has read, by their identity.
    """

    def __init__(self, model: nn.Module, *args: Any, points: str, earlier: PassResult | None, **options: Any) -> None:
        known = {} if earlier is None else {"woken": earlier.woken, "refused": earlier.refused}
        super().__init__(model, *args, **options, **known)
        self.recording = Recording()
        self.residual, self.earlier = points == "residual", earlier
        self.additions = Additions()
        self.received: dict[nn.Module, Node] = {}
        self.visits: list[_Visit] = []
        self.layers_so_far = 0
        self.made: list[Sequence[Node]] = []
        self.renewals: list[Node] = []
        self.operation: tuple[str, Sequence[Any]] | None = None
        self.inside_of: dict[tuple[Any, ...], set[str]] = {}
        self.kinds: dict[nn.Module, tuple[Any, ...]] = {}
        self.entry_of: dict[tuple[str, int], int] = {}
        self.summed: dict[Node, _Visit] = {}
        self.layer_at: dict[Node, _Visit] = {}
        self.between: dict[Node, tuple[_Ways, set[Node]]] = {}
        self.activated: dict[int, Moments] = {}
        self.gains: dict[tuple[Any, ...], float | None] = {}
        self.model, self.weights = model, Weights(model)
        self.layers_seen: list[Layer] = []
        self.inputs_seen: dict[str, Sizes] = {}
        self.branches_seen: dict[int, tuple[Node, Node]] = {}
        self.linear_sums: dict[int, tuple[Node, Sequence[Node]]] = {}
        self.operations = Counter[str]()
        self.last_bent: tuple[Node, str] | None = None
        self.bent_in = Counter[str]()
        self.ran, self.emptied = set[nn.Module](), set[nn.Module]()
        self.unread = {id(parameter) for parameter in model.parameters()}

    # Before the first addition: what may turn out to be the input of the first block.

    def on_module(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Until the first addition shows which module is the first block, keep what each container receives."""
        if not self.residual or self.additions or next(module.children(), None) is None:
            return
        for x in inputs:
            if isinstance(x, Tensor) and x in self.nodes and x.is_floating_point() and x.dim() > 1:
                self._measure_once(x)
                self.received[module] = self.nodes[x]
                return

    def on_use(self, x: Tensor, node: Node) -> None:
        """An activation read twice may be the ancestor of the first addition."""
        note: Note = node.note
        note.uses += 1
        if self.residual and note.uses == 2 and not self.additions and x.is_floating_point() and x.dim() > 1:
            self._measure_once(x)

    def _measure_once(self, x: Tensor) -> None:
        note: Note = self.nodes[x].note
        if note.moments is None:
            note.moments = channel_moments(x, note.channel_axis, examples=self.examples)

    def on_axis(self, x: Tensor) -> None:
        """Measure again what was measured along another axis."""
        note: Note = self.nodes[x].note
        if note.moments is not None:
            note.moments = channel_moments(x, note.channel_axis, examples=self.examples)

    def measure_before_scaling(self, x: Tensor) -> Moments | None:
        """The moments of an activation as it was before the scalings it carries; None of what has no channels."""
        note: Note = self.nodes[x].note
        if note.unscaled is not None:
            return note.unscaled
        if not -x.dim() <= note.channel_axis < x.dim():  # a sum or a mean of everything has no channels
            return None
        divisor = prod(factor.value for factor in note.factors if not isinstance(factor.value, Tensor))
        gains = [factor.value for factor in note.factors if isinstance(factor.value, Tensor)]
        if divisor == 0:
            return None
        return before_gains(channel_moments(x, note.channel_axis, divisor=divisor), gains)

    # Points.

    def on_addition(self, found: Residual, operands: Sequence[Tensor], run: Callable[[], Tensor]) -> Tensor:
        """Measure the branch, add, measure the sum."""
        branch, shortcut = operands[found.branch], operands[1 - found.branch]
        nodes = [self.nodes[operand] for operand in operands]
        shortcut_node = nodes[1 - found.branch]
        self.branches_seen[self.sums - 1] = nodes[found.branch], found.ancestor
        if not self.residual:
            result = run()
            note, source = self.nodes[result].note, shortcut_node.note
            note.stream, note.point, note.normalized = source.stream, source.point, source.normalized
            return result
        branch_note = nodes[found.branch].note
        axis = shortcut_node.note.axis if shortcut_node.note.axis is not None else branch_note.axis
        axis = likely_axis(branch.dim()) if axis is None else axis
        entry = self._begin_of_blocks(found, shortcut)
        branch_note.axis = axis
        before = self.measure_before_scaling(branch)
        encloses = self.additions.count_enclosed(found.ancestor, shortcut_node)
        if found.linear:
            self.linear_sums[self.sums - 1] = found.ancestor, nodes
        else:
            self._mark_inside(found.ancestor, nodes)
        result = run()
        node = self.nodes[result]
        node.note = Note(shape=tuple(result.shape), axis=axis, order=node.note.order, operation="add")
        self.additions.append(node)
        point = Point(
            name=self.stack.name,
            kind="residual",
            shape=tuple(result.shape),
            channel_axis=axis,
            output=channel_moments(result, axis, examples=self.examples),
            branch=before,
            transition=found.weighted_shortcut or found.ancestor.note.shape != tuple(result.shape),
            encloses=encloses,
            woken=branch_note.woken,
            entry=entry,
            broadcast=branch.shape != result.shape,
        )
        self.summed[node] = visit = self._visit(node, shortcut_node.note, point, sum=self.sums - 1)
        visit.branch = nodes[found.branch]
        return result

    def on_weighted(self, x: Tensor, result: Tensor) -> None:
        """Measure a layer's output if it is wanted, and the input of the first of each stream."""
        self._see(x, result)
        if result.dim() < 2 or not result.is_floating_point():
            return
        source: Note = self.nodes[x].note
        if not self.nodes[x].path.weighted and x.is_floating_point() and x.layout == torch.strided:
            sizes = channel_sizes(x, source.channel_axis)
            self.inputs_seen |= {} if sizes is None else {self.stack.name: sizes}
        number = self.layers_so_far
        self.layers_so_far += 1
        point = None
        if self._is_wanted(number):
            point = self._point(
                result,
                "layer",
                bias=self._bias(result),
                entry=self._begin_of_layers(x),
                weight_gain=None if self.operation is None else self._weight_gain(*self.operation),
                looked_up=self.nodes[result].step.nonlinear > 0 and not x.is_floating_point(),
            )
        self._visit(self.nodes[result], source, point, layer=number)

    def _bias(self, result: Tensor) -> Tensor | None:
        """What the layer that is running has added to each channel of its result, whatever the input."""
        bias = None if self.operation is None else op.weight_and_bias(*self.operation)[1]
        if bias is None or bias in self.nodes or bias.shape != (result.shape[self.nodes[result].note.channel_axis],):
            return None
        return bias

    def _see(self, x: Tensor, result: Tensor) -> None:
        """Keep which weights a layer has."""
        name, args = self.operation if self.operation is not None else ("", ())
        node, weight = self.nodes[result], op.weight_and_bias(name, args)[0]
        gain = self._weight_gain(name, args)
        channels = max(1, result.shape[node.note.channel_axis])
        fan_in = None if weight is None or weight.dim() < 2 else weight.numel() // channels
        looked_up = node.step.nonlinear > 0 and not x.is_floating_point()
        names = tuple(self.weights.among(op.tensors_in(args, {})))
        self.layers_seen.append(Layer(node, names, fan_in, gain == 0, looked_up))

    def on_constant(self, name: str, tensors: Sequence[Tensor]) -> None:
        """Keep which weights are read, and in which modules there was nothing to read them for."""
        if any(tensor.numel() == 0 for tensor in tensors):
            self.emptied.update(self.stack.running[-1:])
        elif name not in op.VIEW and self.unread:
            self._note_read(tensors)

    def _note_read(self, tensors: Iterable[Any]) -> None:
        for tensor in tensors:
            if isinstance(tensor, Tensor) and (origin := self.statics.of(tensor).origin) is not None:
                self.unread.discard(id(origin))

    def on_made(self, nodes: Sequence[Node]) -> None:
        """Keep what the graph is made of, and what a normalizer reads."""
        self.made.append(nodes)
        if nodes and nodes[0].note.normalized and not all(parent.note.normalized for parent in nodes[0].parents):
            self.renewals += nodes[0].parents

    def _run(self, name: str, func: Any, args: Sequence[Any], kwargs: dict[str, Any], active: list[Tensor]) -> Any:
        """Execute an operation; where it is the activation of a sum, measure what it makes."""
        self.operation = name, args
        self.operations[name] += 1
        self.ran.update(self.stack.running[-1:])
        if self.unread:
            self._note_read(args)
        sum_ = self.summed.get(self.nodes[active[0]]) if name in op.ACTIVATION and len(active) == 1 else None
        result = super()._run(name, func, args, kwargs, active)
        self.operation = None  # its arguments are activations, and none outlives its use
        if name in op.NONLINEAR and isinstance(result, Tensor) and result in self.nodes:
            self.last_bent = self.nodes[result], self.stack.name
            self.bent_in[self.stack.name] += 1
        if sum_ is not None and sum_.point is not None and self._is_read_once(sum_.number - 1):
            self.activated[sum_.number] = channel_moments(result, sum_.point.channel_axis)
        return result

    def _is_read_once(self, last: int) -> bool:
        """Whether the sum before was read by its activation alone; where one was, all are."""
        before = next((visit for i in range(last, -1, -1) if (visit := self.visits[i]).sum is not None), None)
        return before is None or before.node.note.uses <= 1

    def _visit(
        self, node: Node, source: Note, point: Point | None, *, sum: int | None = None, layer: int | None = None
    ) -> _Visit:
        visit = _Visit(len(self.visits), self.stack.name, node, source, point, sum, layer)
        self.visits.append(visit)
        if layer is not None:
            self.layer_at[node] = visit
        note: Note = node.note
        note.stream, note.point = source.stream, visit.number
        note.normalized = note.averaged = note.mixed = False
        return visit

    def _is_wanted(self, layer: int) -> bool:
        if not self.residual:
            return True
        if self.earlier is not None:
            return layer in self.earlier.layers
        name = self.stack.name
        return not any(
            self._within(module, name) in self.inside_of.get(self._kind(module), ()) for module in self.stack.running
        )

    def _learn_inside(self, layer: str) -> None:
        """Remember where in what kind of module a layer lies inside a block; of the whole model that tells nothing."""
        if len(self.stack.running) > 1:
            block = self.stack.running[-1]
            self.inside_of.setdefault(self._kind(block), set()).add(self._within(block, layer))

    def _kind(self, module: nn.Module) -> tuple[Any, ...]:
        """A module's class and its switches: whether a block has a shortcut may be one."""
        kind = self.kinds.get(module)
        if kind is None:
            switches = ((name, value) for name, value in vars(module).items() if type(value) is bool)
            kind = self.kinds[module] = type(module), *(switch for switch in switches if switch[0] != "training")
        return kind

    def _within(self, module: nn.Module, name: str) -> str:
        """The name of a layer from a module on that it lies in."""
        return name.removeprefix(self.stack.names[module]).removeprefix(".")

    def _weight_gain(self, name: str, args: Sequence[Any]) -> float | None:
        """:func:`weight_gain`, once for each weight of a cell that runs many times; of a table whether it is zero.

        A weight is known again by its memory, so only a parameter's, which lasts: that of a weight computed in the
        forward is the next one's as soon as it is freed.
        """
        weight, _ = op.weight_and_bias(name, args)
        if (name in op.EMBEDDING or name in op.PARTIAL) and isinstance(args[0], Tensor):
            weight = args[0]
        if weight is None or weight.layout != torch.strided or not self.weights.is_parameter(weight):
            return weight_gain(name, args)
        key = weight.data_ptr(), weight._version, weight.shape, weight.stride(), name
        if key not in self.gains:
            self.gains[key] = weight_gain(name, args)
        return self.gains[key]

    def _point(self, x: Tensor, kind: str, *, bias: Tensor | None = None, **position: Any) -> Point:
        note: Note = self.nodes[x].note
        axis = note.channel_axis
        values = x if x.is_floating_point() else x.float()
        moments = channel_moments(values, axis, examples=self.examples, bias=bias)
        position = {"name": self.stack.name, "woken": note.woken, **position}
        return Point(kind=kind, shape=tuple(x.shape), channel_axis=axis, output=moments, **position)

    # Where streams begin.

    def _begin_of_layers(self, x: Tensor) -> int | None:
        """The entry of a stream whose first point is a layer: that layer's input."""
        note: Note = self.nodes[x].note
        if note.point is not None:
            return None
        key = ("layers", note.stream)
        if key not in self.entry_of:
            self.entry_of[key] = len(self.recording.entries)
            self.recording.entries.append(self._point(x, "entry"))
            if self.recording.entry is None and not self.residual:
                self.recording.entry = self.recording.entries[-1]
        return self.entry_of[key]

    def _begin_of_blocks(self, found: Residual, shortcut: Tensor) -> int | None:
        """The entry of a stream's residual blocks: the input of the first one."""
        key = ("blocks", self.nodes[shortcut].note.stream)
        if key in self.entry_of:
            return None
        self.entry_of[key] = len(self.recording.entries)
        if not self.additions:
            self.recording.entry = self._entry(found.ancestor, shortcut)
            self.recording.entries.append(self.recording.entry)
        else:
            self.recording.entries.append(self._point(shortcut, "entry"))
        return len(self.recording.entries) - 1

    def _entry(self, ancestor: Node, shortcut: Tensor) -> Point:
        """The input of the block whose addition is the first: before any pre-activation, after any pooling."""
        entry, name = ancestor, self.stack.name
        for module in reversed(self.stack.running):
            node = self.received.get(module)
            if node is not None and node.dominates(ancestor):
                since = ancestor.path - node.path
                if since.weighted == since.mixing == 0:
                    entry, name = node, self.stack.names[module]
                    break
        note: Note = entry.note
        if note.moments is None:  # read once, by an operation with several results: its shortcut is what is left
            self._measure_once(shortcut)
            note = self.nodes[shortcut].note
        assert note.moments is not None
        return Point(name=name, kind="entry", shape=note.shape, channel_axis=note.channel_axis, output=note.moments)

    # What lies inside a block.

    def _mark_inside(self, ancestor: Node, operands: Sequence[Node]) -> None:
        """Mark the weighted layers between a block's ancestor and the two activations it adds, unless they are many.

        What was found after an ancestor is kept, for thousands of additions may lead back to one.
        """
        ways, marked = self.between.setdefault(ancestor, ({ancestor: (0, _enlarges(ancestor))}, {ancestor}))
        for operand in operands:
            way = _way_from(ancestor, operand, ways)
            if way is not None and (way[0] > LONGEST_BRANCH or way[1]):
                return
        waiting = list(operands)
        while waiting:
            node = waiting.pop()
            if node not in marked and ways.get(node) is not None:
                marked.add(node)
                waiting += node.parents
                if node in self.layer_at:
                    self.layer_at[node].inside = True
                    self._learn_inside(self.layer_at[node].name)

    # The end of the pass.

    def finish(self, outputs: Sequence[Tensor]) -> PassResult:
        """Measure the outputs, and settle which points there are.

        Args:
            outputs: what the model returned.

        Returns:
            What was found; where it is not complete, a pass that is given it completes the recording.
        """
        ends = [self.nodes[tensor] for tensor in outputs if tensor in self.nodes]
        carried, logits = _reaching_ends(self.made, ends), _attention_logits(self.made)
        sums = [visit for visit in self.visits if visit.sum is not None]
        refused = {v.sum for v in sums if v.sum is not None and (v.node not in carried or v.node in logits)}
        refused |= {visit.sum for visit in sums if visit.sum is not None and visit.node in self.inner}
        if not op.NONLINEAR.isdisjoint(self.operations):
            refused |= self.linear_sums.keys()
        else:
            for ancestor, nodes in self.linear_sums.values():
                self._mark_inside(ancestor, nodes)
        outside = [v for v in self.visits if v.layer is not None and (not self.residual or not v.inside)]
        result = PassResult(
            layers=frozenset(visit.layer for visit in outside if visit.layer is not None),
            woken=tuple(sorted(self.silencing)),
            refused=frozenset(refused),
            complete=not (refused or self.silencing or any(visit.point is None for visit in outside)),
        )
        if self.earlier is not None or result.complete:
            self.recording.outputs = [self._output(t, i) for i, t in enumerate(outputs) if self._is_output(t)]
            self._settle(carried)
            self.recording.unmeasured = tuple(self._unmeasured())
            architecture = self._architecture(carried, refused, attends=bool(logits))
            activation, module = self._last_activation(ends)
            self.recording.architecture = replace(
                architecture,
                softmax=self._is_softmax(outputs),
                last_activation=activation,
                last_module=module,
                inputs=tuple(self.inputs_seen.items()),
            )
        return result

    def _unmeasured(self) -> Iterator[str]:
        """The names of the layers (modules with a weight and no parts) of which nothing that was recorded is made."""
        for module, name in self.stack.names.items():
            if not module._modules.keys() <= {"parametrizations"} or ".parametrizations." in f".{name}":
                continue
            weights = [parameter for parameter in module.parameters() if parameter.dim() > 1]
            read = module not in self.emptied and any(id(weight) not in self.unread for weight in weights)
            if weights and module not in self.ran and not read and not isinstance(module, torch.jit.ScriptModule):
                yield name

    def _architecture(self, carried: Collection[Node], refused: Collection[int], *, attends: bool) -> Architecture:
        """What the model is made of."""
        seen = Seen(
            layers=self.layers_seen,
            branches=[found for number, found in self.branches_seen.items() if number not in refused],
            nodes=[node for nodes in self.made for node in nodes],
            carried=carried,
            attends=attends or not op.ATTENTION.isdisjoint(self.operations.keys()),
            operations=self.operations,
        )
        return architecture_of(self.model, self.weights, seen)

    def _settle(self, carried: Collection[Node]) -> None:
        """Give every point that is kept its place, and what is known of it at the end."""
        followed = ancestors(visit.node for visit in self.visits if visit.layer is not None and visit.node in carried)
        renewed = set(_back_to_points(self.renewals, self.summed))
        zero = {v.node for v in self.visits if v.point is not None and v.layer is not None and v.point.weight_gain == 0}
        kept = {v.number: v for v in self.visits if v.point is not None and not (self.residual and v.inside)}
        larger = self._larger_terms()
        first_operands = {self.visits[number].source.point for number in kept}
        for visit in kept.values():
            source = visit.source
            after, normalized, averaged = source.point, source.normalized, source.averaged
            while after is not None and after not in kept:
                gone = self.visits[after].source
                after, normalized, averaged = gone.point, normalized or gone.normalized, averaged or gone.averaged
            while after is not None and after in larger:
                after = larger[after] if larger[after] < visit.number else self.visits[after].source.point
            assert visit.point is not None
            entry = visit.point.entry
            if after is None and entry is None:
                ways = (("blocks", source.stream), ("layers", source.stream))
                entry = next((self.entry_of[way] for way in ways if way in self.entry_of), None)
            alone, residual = visit.node.note.uses <= 1, visit.sum is not None
            point = replace(
                visit.point,
                number=visit.number,
                after=after,
                entry=entry,
                normalized=normalized,
                averaged=averaged,
                mixed=source.mixed,
                renewed=visit.node in renewed,
                last=visit.layer is not None and visit.node not in followed,
                joined=residual and visit.node in followed and visit.number not in first_operands,
                gate=visit.layer is not None and visit.node not in carried,
                smaller_term=visit.number in larger,
                activated=self.activated.get(visit.number) if alone else None,
                zero_gate=bool(zero) and _is_zero(visit.point.branch) and _is_gated_by(zero, visit.branch),
            )
            (self.recording.points if residual or not self.residual else self.recording.layers).append(point)
        self._drop_entries_of_none()

    def _larger_terms(self) -> dict[int, int]:
        """Of layers whose outputs are added at once the number of the one of the larger variance, by the others'.

        What goes on is the sum: what one term has lost beside the other is no loss of the signal's.
        """
        larger, term_of = dict[int, int](), dict[Node, _Visit]()
        for node in (node for nodes in self.made for node in nodes):
            visit, name = self.layer_at.get(node), node.note.operation
            if visit is not None and visit.point is not None and not visit.inside:
                term_of[node] = visit
                continue
            before = list(dict.fromkeys(node.parents))
            terms = [term_of[each] for each in before if each in term_of]
            if node.step.weighted or node in self.summed or len(terms) < len(before):
                continue
            if len(terms) == 1 and (name in op.PARTIAL or name == "add" or name == before[0].note.operation):
                term_of[node] = terms[0]
            elif len(terms) == 2 and name == "add":
                less, more = sorted(terms, key=lambda one: _variance(one.point))
                term_of[node] = more
                if less is not more:
                    larger[less.number] = more.number
        return larger

    def _drop_entries_of_none(self) -> None:
        """Keep the entries that a kept point begins at; a layer inside a block has left one that none does."""
        recording = self.recording
        points = (*recording.points, *recording.layers)
        used = sorted({point.entry for point in points if point.entry is not None})
        recording.entries = [recording.entries[entry] for entry in used]
        for kept in (recording.points, recording.layers):
            kept[:] = [
                point if point.entry is None else replace(point, entry=used.index(point.entry)) for point in kept
            ]

    def _is_output(self, tensor: Tensor) -> bool:
        return tensor in self.nodes and tensor.is_floating_point() and tensor.dim() > 1 and tensor.numel() > 0

    def _is_softmax(self, outputs: Sequence[Tensor]) -> bool:
        """Whether the one output is a softmax over the channels, whose operation was the last but for views."""
        if len(outputs) != 1 or not self._is_output(outputs[0]):
            return False
        note: Note = self.nodes[outputs[0]].note
        if note.operation not in op.SOFTMAX:
            return False
        total = outputs[0].detach().float().sum(note.channel_axis)
        return bool(((total - 1).abs() < 0.01).all())

    def _last_activation(self, ends: Sequence[Node]) -> tuple[str, str]:
        """What bends the one output last, behind all layers, and the module of torch's that does nothing else."""
        if len(ends) != 1 or self.last_bent is None:
            return "", ""
        (node,), (bent, name) = ends, self.last_bent
        while node is not bent:
            if node.step.weighted or len(set(node.parents)) != 1:
                return "", ""
            node = node.parents[0]
        module = dict(self.model.named_modules(remove_duplicate=False))[name]
        alone = type(module).__module__ == nn.ReLU.__module__ and self.bent_in[name] == 1 and name != ""
        return title_of(bent.note.operation), name if alone else ""

    def _output(self, tensor: Tensor, index: int) -> Point:
        return self._point(tensor, "output", name=f"output {index}", after=self.nodes[tensor].note.point)


def _variance(point: Point | None) -> float:
    return 0.0 if point is None else point.output.avg_channel_var


def before_gains(moments: Moments, gains: Sequence[Tensor]) -> Moments | None:
    """The moments before gains of the channels [C] were multiplied in; None if they left nothing to see.

    Channels that a gain silences have no trace of what they were and are left out.
    """
    for gain in gains:
        if gain.numel() != moments.mean.numel():
            return None
        kept = gain != 0
        if not kept.any():
            return None
        moments = moments.channels(kept).divide(gain[kept])
    return moments


def weight_gain(name: str, args: Sequence[Any]) -> float | None:
    """Root mean square of an operation's weight times the root of its fan-in; He's initialisation has √2.

    The rows of a table are not added up: of it there is 0 if all of it is zero, and None otherwise.
    """
    if name in op.EMBEDDING or name in op.PARTIAL:
        return None if not isinstance(args[0], Tensor) or args[0].any() else 0.0
    weight, _ = op.weight_and_bias(name, args)
    if weight is None or weight.dim() < 2 or not weight.is_floating_point():
        return None
    if name in op.CONVOLUTION:
        transposed = len(args) > 6 and bool(args[6])
        fan_in = weight.numel() / weight.shape[1] / prod(args[3]) if transposed else weight[0].numel()
    else:
        fan_in = weight.shape[1] if name == "linear" else weight.shape[0]
    inner_last = sorted(range(weight.dim()), key=lambda axis: -weight.stride(axis))
    rows = weight.detach().permute(inner_last).flatten(1)
    lengths = torch.linalg.vector_norm(rows.float(), dim=1)
    if not 1e-15 < lengths.min() <= lengths.max() < 1e15:  # squares that single precision may not hold
        lengths = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    return (torch.linalg.vector_norm(lengths.double()) * (fan_in / weight.numel()) ** 0.5).item()


def _enlarges(node: Node) -> bool:
    """Whether a convolution or an interpolation of maps made more positions than it was given."""
    if node.note.axis != 1 or len(node.note.shape) < 4 or not node.step.mixing or node.step.nonlinear:
        return False
    before = [parent.note.shape for parent in node.parents if parent.note.axis == 1]
    return any(len(shape) == len(node.note.shape) and prod(shape[2:]) < prod(node.note.shape[2:]) for shape in before)


_Ways = dict[Node, tuple[int, bool] | None]
"""By activation, the most weighted operations on any path from an ancestor, and whether a map grew on one; or None."""


def _way_from(ancestor: Node, node: Node, ways: _Ways) -> tuple[int, bool] | None:
    """The paths from an ancestor to an activation; None if it was not computed from it. ``ways`` is added to."""
    waiting = [node]
    while waiting:
        node = waiting[-1]
        if node not in ways and (node.note.order <= ancestor.note.order or node.number < ancestor.first_reader):
            ways[node] = None  # made before anything was computed from the ancestor
        if node in ways:
            waiting.pop()
        elif unknown := [parent for parent in node.parents if parent not in ways]:
            waiting += unknown
        else:
            before = [way for parent in node.parents if (way := ways[parent]) is not None]
            weighted, grown = max((way[0] for way in before), default=0), any(way[1] for way in before)
            ways[node] = (weighted + node.step.weighted, grown or _enlarges(node)) if before else None
    return ways[node]


def _is_zero(branch: Moments | None) -> bool:
    """Whether all values of a branch are zero, or no scale let anything through."""
    return branch is None or branch.avg_channel_var == branch.avg_channel_sq_mean == 0


def _is_gated_by(layers: Collection[Node], branch: Node | None) -> bool:
    """Whether the last product of activations in a branch is with a gate that one of some layers computes."""
    node = branch
    while node is not None and not node.step.weighted and len(set(node.parents)) == 1:
        node = node.parents[0]
    if node is None or node.step.weighted or not node.step.nonlinear:
        return False
    for factor in node.parents:
        while factor not in layers and not factor.step.weighted and len(set(factor.parents)) == 1:
            factor = factor.parents[0]
        if factor in layers:
            return True
    return False


def _reaching_ends(made: Sequence[Sequence[Node]], ends: Sequence[Node]) -> set[Node]:
    """The activations whose values go on to an output (or to an end that is none), and not into gates alone.

    Queries and keys do, as where attention is one operation; the logits they make, and what is added to those, do not.
    """
    read = {parent for nodes in made for node in nodes for parent in node.parents}
    waiting = [node for nodes in made if not any(each in read for each in nodes) for node in nodes] + list(ends)
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        gates = _gates_of(node)
        before = [parent for parent in node.parents if parent not in gates]
        before += [each for gate in gates for each in _queries_and_keys(gate)]
        new = set(before) - seen
        seen |= new
        waiting += new
    return seen


def _queries_and_keys(gate: Node) -> list[Node]:
    """What the logits of attention weights are products of; nothing of another gate."""
    maker = _gate_maker(gate)
    if maker is None or "softmax" not in maker.note.operation:
        return []
    found, waiting, seen = list[Node](), list(maker.parents), set(maker.parents)
    while waiting:
        node = waiting.pop()
        if node.step.mixing and node.step.nonlinear and len(set(node.parents)) > 1:
            found += node.parents
        elif not node.step.weighted:
            new = set(node.parents) - seen
            seen |= new
            waiting += new
    return found


def _gates_of(node: Node) -> set[Node]:
    """The factors of a product of activations that are gates of the other, or weights (of attention, convolutions)."""
    factors = set(node.parents)
    if len(factors) > 1 and node.note.operation in op.CONVOLUTION:  # a hypernetwork's, or a mixture of experts'
        return factors - {node.parents[0]}
    if len(factors) < 2 or not node.step.nonlinear:
        return set()
    gates = {factor for factor in factors if _gate_maker(factor) is not None}
    return gates if gates != factors else set()


def _gate_maker(node: Node) -> Node | None:
    """The sigmoid or softmax that made an activation, seen past views, dropout, and sums and products with numbers."""
    while node.step.nonlinear == node.step.mixing == node.step.weighted == 0 and len(set(node.parents)) == 1:
        node = node.parents[0]
    return node if node.step.nonlinear and node.note.operation in op.BOUNDED_GATE else None


def _attention_logits(made: Sequence[Sequence[Node]]) -> set[Node]:
    """What the softmax of an attention reads, also where it goes on to the next layer's logits."""
    found = set[Node]()
    for nodes in made:
        for gate in _gates_of(nodes[0]) if nodes else ():
            maker = _gate_maker(gate)
            if maker is not None and "softmax" in maker.note.operation:
                node = maker.parents[0]
                found.add(node)
                while node.step == Path() and len(set(node.parents)) == 1:
                    node = node.parents[0]
                    found.add(node)
    return found


def _back_to_points(nodes: Iterable[Node], sums: Collection[Node]) -> Iterator[Node]:
    """The layers, and the sums read once, that lead to some activations through elementwise operations and pools."""
    for node in nodes:
        while not node.step.weighted and node not in sums and len(set(node.parents)) == 1:
            node = node.parents[0]
        if node.step.weighted or (node in sums and node.note.uses <= 1):
            yield node
