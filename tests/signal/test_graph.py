"""Which additions are residual, on graphs written by hand: the rules know nothing of tensors."""

from __future__ import annotations

import sys

import pytest

from normfree.signal import graph
from normfree.signal.graph import Node, Path, meet, residual

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


def _steps(blocks: int, block) -> int:
    """Lines of graph.py that run while a network of so many blocks is recorded and judged."""
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
        x = layer(source())
        for _ in range(blocks):
            shortcut, branch = block(x)
            assert residual(shortcut, branch) is not None
            x = add(shortcut, branch)
    finally:
        sys.settrace(previous)
    return steps


@pytest.mark.parametrize(
    "block",
    [
        lambda x: (x, layer(bend(layer(x)))),
        lambda x: (layer(bend(x)), layer(bend(layer(bend(x))))),
        lambda x: (x, bend(layer(x), bend(layer(pool(layer(x)))))),
    ],
    ids=["identity", "projection", "gated"],
)
def test_the_cost_is_linear_in_depth(block):
    few, many = _steps(50, block), _steps(200, block)
    assert many <= 4.2 * few  # four times the blocks; a quadratic cost would be sixteen times the steps
