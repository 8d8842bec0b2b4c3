"""Which additions are residual, on graphs written by hand: the rules know nothing of tensors."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
from graph_reference import Reference
from hypothesis import given, settings
from hypothesis import strategies as st

from normfree.trace import graph
from normfree.trace.graph import Additions, Node, Path, meet, residual

LAYER = Path(weighted=1, mixing=1)
BEND = Path(nonlinear=1)
POOL = Path(mixing=1)
PART = Path(partial=1)


def source() -> Node:
    """An input: below the root that stands above all inputs."""
    return Node((Node(()),))


def layer(*parents: Node) -> Node:
    return Node(parents, LAYER)


def bend(*parents: Node) -> Node:
    return Node(parents, BEND)


def pool(x: Node) -> Node:
    return Node((x,), POOL)


def part(x: Node) -> Node:
    return Node((x,), PART)


def add(*parents: Node) -> Node:
    return Node(parents)


def both_ways(first: Node, second: Node):
    """The verdict, which must not depend on the order of the operands; with the branch as a node."""
    found, swapped = residual(first, second), residual(second, first)
    if found is None or swapped is None:
        assert found is swapped is None
        return None
    assert (found.ancestor, found.weighted_shortcut) == (swapped.ancestor, swapped.weighted_shortcut)
    assert found.branch == 1 - swapped.branch
    return found.ancestor, (first, second)[found.branch], found.weighted_shortcut


def test_identity_shortcut():
    x = layer(source())
    branch = layer(bend(layer(x)))
    assert both_ways(x, branch) == (x, branch, False)


def test_the_input_itself_may_be_the_shortcut():
    x = source()
    branch = layer(x)
    assert both_ways(x, branch) == (x, branch, False)


def test_projection():
    x = layer(source())
    branch, shortcut = layer(bend(layer(x))), layer(x)
    assert both_ways(shortcut, branch) == (x, branch, True)


def test_pooled_projection():
    x = layer(source())
    branch, shortcut = layer(bend(layer(x))), layer(pool(x))
    assert both_ways(shortcut, branch) == (x, branch, True)


def test_preactivation_shared_by_shortcut_and_branch():
    x = layer(source())
    activated = bend(x)
    branch, shortcut = layer(bend(layer(activated))), layer(activated)
    assert both_ways(shortcut, branch) == (activated, branch, True)


def test_preactivation_with_identity_shortcut():
    x = layer(source())
    branch = layer(bend(layer(bend(x))))
    assert both_ways(x, branch) == (x, branch, False)


def test_parallel_attention_and_mlp_are_two_branches_of_one_block():
    x = layer(source())
    attention, mlp = layer(bend(layer(x))), layer(bend(layer(x)))
    first = add(x, attention)
    assert both_ways(x, attention) == (x, attention, False)
    assert both_ways(first, mlp) == (x, mlp, False)


def test_parallel_branches_summed_before_the_shortcut_is_added():
    x = layer(source())
    attention, mlp = layer(bend(layer(x))), layer(bend(layer(x)))
    assert both_ways(attention, mlp) is None
    total = add(attention, mlp)
    assert both_ways(x, total) == (x, total, False)


def test_a_branch_that_only_pools():
    x = layer(source())
    branch = pool(x)
    assert both_ways(x, branch) == (x, branch, False)


def test_a_branch_with_a_gate_computed_from_itself():
    x = layer(source())
    out = layer(bend(layer(x)))
    gated = bend(out, bend(layer(pool(out))))
    assert both_ways(x, gated) == (x, gated, False)


def test_a_long_skip_over_other_blocks():
    start = layer(source())
    x = start
    for _ in range(3):
        x = add(x, layer(bend(x)))
    branch = layer(x)
    assert both_ways(start, branch) == (start, branch, False)


def test_parallel_convolutions_of_equal_standing_are_not_residual():
    x = layer(source())
    assert both_ways(layer(x), layer(x)) is None


def test_fusion_of_streams_through_nonlinearities_is_not_residual():
    x = layer(source())
    short, long = bend(layer(x)), bend(layer(bend(layer(x))))
    assert both_ways(short, long) is None


def test_an_activation_without_layers_is_no_shortcut():
    x = layer(source())
    assert both_ways(bend(x), layer(layer(x))) is None


def test_slices_of_one_tensor_are_not_residual():
    x = layer(source())
    left, right = part(x), part(x)
    assert both_ways(left, layer(right)) is None


def test_two_inputs_are_not_residual():
    root = Node(())
    image, position = Node((root,)), Node((root,))
    assert both_ways(layer(image), position) is None
    assert both_ways(layer(image), layer(layer(position))) is None


def test_what_two_blocks_of_a_stream_give_to_a_sum_beside_it_is_not_residual():
    stream, given = source(), []
    for _ in range(2):
        inner = bend(layer(stream))
        given.append(layer(inner))
        stream = add(stream, layer(inner))
    assert both_ways(*given) is None


def test_a_projection_beside_a_branch_that_reads_another_input_is_residual():
    root = Node(())
    x, time = bend(layer(Node((root,)))), layer(Node((root,)))
    shortcut, branch = layer(x), layer(bend(add(layer(x), time)))
    assert both_ways(shortcut, branch) is not None


def test_an_activation_added_to_itself_is_not_residual():
    x = layer(source())
    assert both_ways(x, x) is None


def test_a_bias_path_without_layers_is_not_residual():
    x = layer(source())
    assert both_ways(x, Node((x,))) is None


def test_dominators_run_through_what_all_paths_share():
    x = layer(source())
    left, right = layer(x), bend(x)
    joined = add(left, right)
    after = layer(joined)
    assert after.dominator is joined
    assert joined.dominator is x
    assert x.dominates(after)
    assert x.dominates(x)
    assert joined.dominates(after)
    assert not left.dominates(joined)
    assert not right.dominates(after)
    assert not after.dominates(x)


def test_where_two_activations_meet():
    x = layer(source())
    left, right = layer(layer(x)), layer(x)
    assert meet(left, right) is x
    assert meet(left, left.dominator) is left.dominator
    root = Node(())
    assert meet(layer(Node((root,))), Node((root,))) is root


def test_a_path_counts_the_least_layers_and_the_most_mixing():
    x = source()
    joined = add(layer(layer(bend(x))), pool(pool(pool(x))))
    assert joined.path - x.path == Path(weighted=0, mixing=3, nonlinear=0, partial=0)
    through = add(layer(bend(x)), layer(layer(x)))
    assert through.path - x.path == Path(weighted=1, mixing=2, nonlinear=0, partial=0)


STEPS = (Path(), LAYER, BEND, POOL, PART, Path(weighted=1, mixing=1, nonlinear=1))


@st.composite
def graphs(draw) -> tuple[list[list[int]], list[Path]]:
    """Parents and steps of up to 16 activations below one to three inputs; some read far back, most nearby."""
    inputs = draw(st.integers(1, 3))
    parents, steps = [[], *[[0]] * inputs], [Path()] * (1 + inputs)
    for number in range(1 + inputs, draw(st.integers(4, 16)) + inputs):
        far = st.integers(1, number - 1)
        near = st.integers(max(1, number - 4), number - 1)
        parents.append(draw(st.lists(st.one_of(near, near, far), min_size=1, max_size=3)))
        steps.append(draw(st.sampled_from(STEPS)))
    return parents, steps


@settings(max_examples=60, deadline=None)
@given(graphs())
def test_every_decision_is_the_one_by_definition(drawn):
    """Of every pair that could be added, asked in the order in which a recording asks: before what comes after."""
    parents, steps = drawn
    reference = Reference(parents, steps)
    nodes: list[Node] = []
    for above, step in zip(parents, steps, strict=True):
        nodes.append(Node([nodes[parent] for parent in above], step))
        last = len(nodes) - 1
        assert (nodes[last].level, nodes[last].depth + 1) == (reference.levels[last], len(reference.dominators[last]))
        for other in range(1, last):
            found = residual(nodes[last], nodes[other])
            decision = found and (nodes.index(found.ancestor), found.branch, found.weighted_shortcut)
            assert decision == reference.residual(last, other), (last, other)
            assert nodes.index(meet(nodes[last], nodes[other])) == reference.meet(last, other)
            assert nodes[other].dominates(nodes[last]) == (other in reference.dominators[last])


@settings(max_examples=60, deadline=None)
@given(graphs(), st.data())
def test_the_additions_inside_a_branch(drawn, data):
    """Those that depend on the ancestor and that the shortcut does not depend on, whichever sums are additions."""
    parents, steps = drawn
    nodes, sums, additions = list[Node](), list[Node](), Additions()
    for above, step in zip(parents, steps, strict=True):
        node = Node([nodes[parent] for parent in above], step)
        nodes.append(node)
        if len(set(above)) > 1 and data.draw(st.booleans()):
            additions.append(node)
            sums.append(node)
        for ancestor in nodes:
            if ancestor.dominates(node):
                inside = [each for each in sums if each is not ancestor and ancestor.dominates(each)]
                expected = sum(not each.dominates(node) for each in inside)
                assert additions.count_enclosed(ancestor, node) == expected
    assert len(additions) == len(sums)


def _lines(build: Callable[[int], object], size: int) -> int:
    """Lines of graph.py that run while a network of a size is recorded and judged."""
    steps = 0

    def trace(frame, event, argument):
        nonlocal steps
        if frame.f_code.co_filename != graph.__file__:
            return None
        steps += event == "line"
        return trace

    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        build(size)
    finally:
        sys.settrace(previous)
    return steps


def _blocks(block: Callable[[Node], tuple[Node, Node]]) -> Callable[[int], Node]:
    """Residual blocks one after the other."""

    def build(blocks: int) -> Node:
        x = layer(source())
        for _ in range(blocks):
            shortcut, branch = block(x)
            assert residual(shortcut, branch) is not None
            x = add(shortcut, branch)
        return x

    return build


def _cell(inputs: int, partial: bool) -> Callable[[int], Node]:
    """A gated cell with a residual, unrolled; its first state is zero or a second input."""

    def build(steps: int) -> Node:
        root = Node(())
        x = Node((root,))
        hidden = cell = Node((root,)) if inputs == 2 else None
        for _ in range(steps):
            now = layer(part(x))
            if hidden is not None:
                state = layer(hidden)
                residual(now, state)
                now = add(now, state)
            gates = [bend(part(now) if partial else now) for _ in range(4)]
            kept = bend(gates[0], gates[1])
            if cell is not None:
                forgotten = bend(gates[2], cell)
                residual(forgotten, kept)
                kept = add(forgotten, kept)
            cell = kept
            new = bend(gates[3], bend(cell))
            if hidden is not None:
                residual(hidden, new)
            hidden = new if hidden is None else add(hidden, new)
        assert hidden is not None
        return hidden

    return build


def _gated_unit(*, at_once: bool) -> Callable[[int], Node]:
    """A gated recurrent unit unrolled, its inputs taken one by one or all at once before the first step."""

    def build(steps: int) -> Node:
        x = source()
        taken = [part(x) for _ in range(steps)] if at_once else None
        hidden = bend(layer(part(x)))
        for step in range(steps):
            given, state = layer(taken[step] if taken else part(x)), layer(hidden)
            gates = []
            for _ in range(3):
                one, other = part(given), part(state)
                residual(one, other)
                gates.append(add(one, other))
            new, kept = bend(bend(gates[0]), gates[1]), bend(bend(gates[2]), hidden)
            residual(new, kept)
            hidden = add(new, kept)
        return hidden

    return build


def _early(second_input: bool) -> Callable[[int], Node]:
    """The same early activation, weighted anew, is added at every step."""

    def build(steps: int) -> Node:
        root = Node(())
        early = Node((root,))
        x = add(layer(Node((root,))), layer(early)) if second_input else layer(early)
        for _ in range(steps):
            branch = layer(early)
            residual(x, branch)
            x = bend(add(x, branch))
        return x

    return build


def _straight(additions: int) -> Node:
    """A deep linear network, at whose end as many additions reach back over all of it."""
    x = source()
    for _ in range(additions):
        x = layer(x)
    total = layer(x)
    for _ in range(additions):
        branch = layer(x)
        residual(total, branch)
        total = add(total, branch)
    return total


def _sums(layers: int) -> Node:
    """Each layer reads the sum of all before it, added up anew."""
    outs = [bend(layer(source()))]
    for _ in range(layers):
        total = outs[0]
        for out in outs[1:]:
            residual(total, out)
            total = add(total, out)
        outs.append(bend(layer(total)))
    return outs[-1]


GROWING: dict[str, tuple[Callable[[int], Node], int]] = {
    "identity": (_blocks(lambda x: (x, layer(bend(layer(x))))), 4),
    "projection": (_blocks(lambda x: (layer(bend(x)), layer(bend(layer(bend(x)))))), 4),
    "gated": (_blocks(lambda x: (x, bend(layer(x), bend(layer(pool(layer(x))))))), 4),
    "unrolled cell": (_cell(inputs=1, partial=True), 4),
    "unrolled cell with a given state": (_cell(inputs=2, partial=True), 4),
    "unrolled cell without slices": (_cell(inputs=2, partial=False), 4),
    "unrolled gated unit": (_gated_unit(at_once=False), 4),
    "unrolled gated unit, its inputs taken at once": (_gated_unit(at_once=True), 4),
    "one early activation": (_early(second_input=False), 4),
    "one early activation of another input": (_early(second_input=True), 4),
    "straight": (_straight, 4),
    "sums of everything": (_sums, 16),
}


@pytest.mark.parametrize("kind", GROWING)
def test_the_cost_grows_as_the_graph(kind):
    """Four times the blocks (16 times the additions of sums): 4.4 allows for jumps of log(depth) steps."""
    build, growth = GROWING[kind]
    few, many = _lines(build, 25), _lines(build, 100)
    assert many <= 1.1 * growth * few
