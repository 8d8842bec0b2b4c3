"""The recorded dataflow as a graph of activations, and which additions in it are residual.

Every activation is a :class:`Node` with its immediate dominator: the last activation that every path from
the input to it runs through. That answers most questions at a cost linear in depth:

- the nearest activation two others *both depend on entirely* is where their dominator chains meet;
- the least (or greatest) number of weighted operations on any path from a dominator to a node is the
  difference of their numbers from the input, since every path runs through the dominator.

A branch that also reads something else (cross-attention to a memory, a time embedding, a class token's
attention to the patches) does not depend on its shortcut entirely; there the parents are searched backwards.

Nothing here knows torch: the rules are tested on graphs written by hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Path:
    """What the paths between two activations pass: the least of any path for each kind, or the most.

    Attributes:
        weighted: operations with a parameter tensor that mixes channels or positions; the least.
        mixing: weighted operations, pooling, attention and every other mixing of positions; the most.
        nonlinear: activation functions and products of two activations; the least.
        partial: operations that keep only a part of their input (slices, splits); the least.
    """

    weighted: int = 0
    mixing: int = 0
    nonlinear: int = 0
    partial: int = 0

    def __sub__(self, other: Path) -> Path:
        return Path(
            self.weighted - other.weighted,
            self.mixing - other.mixing,
            self.nonlinear - other.nonlinear,
            self.partial - other.partial,
        )

    def __add__(self, other: Path) -> Path:
        return Path(
            self.weighted + other.weighted,
            self.mixing + other.mixing,
            self.nonlinear + other.nonlinear,
            self.partial + other.partial,
        )

    @staticmethod
    def joined(paths: Sequence[Path]) -> Path:
        """Of several paths to one place, the least of each count, and the most of mixing."""
        return Path(
            min(p.weighted for p in paths),
            max(p.mixing for p in paths),
            min(p.nonlinear for p in paths),
            min(p.partial for p in paths),
        )


class Node:
    """One activation: where it came from, and what the recorder knows of it.

    Attributes:
        parents: the activations it was computed from.
        step: what the operation that made it adds to a path.
        level: length of the longest path from the root; every parent's is smaller.
        dominator: the last activation all of this one depends on; None for the root above all inputs.
        depth: number of dominators above.
        path: counts from the root.
        note: what the recorder attaches (layout, scaling, statistics).
    """

    __slots__ = ("depth", "dominator", "level", "note", "parents", "path", "step")

    def __init__(self, parents: Sequence[Node], step: Path = Path(), note: Any = None) -> None:
        self.parents = tuple(parents)
        self.step = step
        self.level = 1 + max((parent.level for parent in parents), default=-1)
        self.dominator: Node | None = None
        self.depth = 0
        self.path = step
        self.note = note
        if parents:
            self.dominator = parents[0]
            for parent in parents[1:]:
                self.dominator = meet(self.dominator, parent)
            self.depth = self.dominator.depth + 1
            self.path = Path.joined([parent.path for parent in parents]) + step

    def dominates(self, other: Node) -> bool:
        """Whether all of ``other`` depends on this node (a node dominates itself)."""
        node: Node | None = other
        while node is not None and node.depth > self.depth:
            node = node.dominator
        return node is self


def meet(first: Node, second: Node) -> Node:
    """The nearest activation that both depend on entirely; the root if they have none but it."""
    while first is not second:
        if first.depth >= second.depth:
            assert first.dominator is not None, "two roots in one graph"
            first = first.dominator
        else:
            assert second.dominator is not None, "two roots in one graph"
            second = second.dominator
    return first


@dataclass(frozen=True)
class Residual:
    """A residual addition: ``ancestor`` reaches it by a shortcut and by a branch.

    Attributes:
        ancestor: the activation both operands were computed from.
        branch: 0 or 1, the operand that is the branch.
        weighted_shortcut: the shortcut is a projection.
    """

    ancestor: Node
    branch: int
    weighted_shortcut: bool


def residual(first: Node, second: Node) -> Residual | None:
    """Decide whether the sum of two activations of one shape is a residual addition.

    It is when both were computed from one ancestor, one of them (the branch) has passed more weighted
    operations since than the other (the shortcut), or as many and more mixing (a branch that only pools),
    and the shortcut is linear (a projection may see its input activated). Excluded so are sums of
    parallel paths of equal standing (re-parametrised convolutions), of streams that went separate ways
    through nonlinearities (high-resolution fusion, attention logits), and of different parts of one
    tensor (the hierarchy inside a Res2Net block).

    Args:
        first: one operand.
        second: the other.

    Returns:
        The residual addition, or None.
    """
    found = [each for each in (_with_one_source(first, second), _with_side_input(first, second)) if each]
    return max(found, key=lambda each: each.ancestor.level, default=None)


def _with_one_source(first: Node, second: Node) -> Residual | None:
    """Both operands depend on one ancestor alone."""
    ancestor = meet(first, second)
    if ancestor.dominator is None:
        return None
    since = [first.path - ancestor.path, second.path - ancestor.path]
    effort = [(path.weighted, path.mixing) for path in since]
    if effort[0] == effort[1]:
        return None
    branch = 0 if effort[0] > effort[1] else 1
    shortcut = since[1 - branch]
    if shortcut.nonlinear and not _is_projection_of_activated((first, second)[1 - branch], ancestor):
        return None
    if shortcut.partial and _starts_from_part((first, second)[branch], ancestor):
        return None
    return Residual(ancestor, branch, shortcut.weighted > 0)


def _is_projection_of_activated(node: Node, ancestor: Node) -> bool:
    """Whether every nonlinearity since the ancestor came before the first weighted operation.

    A pre-activation block that projects its shortcut may activate shortcut and branch each for itself.
    """
    whole = since = node.path - ancestor.path
    while since.weighted:
        assert node.dominator is not None, "an ancestor dominates its shortcut"
        node = node.dominator
        since = node.path - ancestor.path
    return bool(whole.weighted) and since.nonlinear == whole.nonlinear


def _starts_from_part(node: Node, ancestor: Node) -> bool:
    """Whether a part was taken of the ancestor before any weighted operation, on every path from it.

    A part of what the whole was turned into (the residual half of a dual-path block, the keys of class
    attention) is no part of the ancestor.
    """
    untouched, whole = {ancestor}, set[Node]()
    for later in sorted(_between(ancestor.level, node), key=lambda each: each.level):
        if any(parent in whole for parent in later.parents):
            whole.add(later)
        if any(parent in untouched for parent in later.parents):
            if later.step.weighted:
                whole.add(later)
            elif not later.step.partial:
                untouched.add(later)
    return node not in untouched and node not in whole


def _with_side_input(first: Node, second: Node) -> Residual | None:
    """One operand leads straight back to an activation that the other was computed from, among others."""
    for branch, (node, shortcut) in enumerate(((first, second), (second, first))):
        way = _way_back(shortcut)
        found = _paths_from_nearest(way, node)
        if found is None:
            continue
        ancestor, since = found
        straight = shortcut.path - ancestor.path
        if since.weighted > straight.weighted and not (since.partial and straight.partial):
            return Residual(ancestor, branch, straight.weighted > 0)
    return None


def _way_back(node: Node) -> list[Node]:
    """The activations behind ``node`` up to where signals were last joined or bent, nearest first."""
    way = [node]
    while len(set(node.parents)) == 1 and not node.step.nonlinear and node.parents[0].dominator is not None:
        node = node.parents[0]
        way.append(node)
    return way


def _paths_from_nearest(way: Sequence[Node], node: Node) -> tuple[Node, Path] | None:
    """The nearest activation of a way back that ``node`` was computed from, and what the paths from it pass."""
    behind = _between(way[-1].level, node)
    ancestor = next((each for each in way if each in behind and each is not node), None)
    if ancestor is None:
        return None
    since = {ancestor: Path()}
    for later in sorted(behind, key=lambda each: each.level):
        paths = [since[parent] for parent in later.parents if parent in since]
        if paths:
            since[later] = Path.joined(paths) + later.step
    return ancestor, since[node]


def _between(level: int, node: Node) -> set[Node]:
    """All that ``node`` was computed from, itself included, down to a level."""
    seen, waiting = {node}, [node]
    while waiting:
        for parent in waiting.pop().parents:
            if parent.level >= level and parent not in seen:
                seen.add(parent)
                waiting.append(parent)
    return seen
