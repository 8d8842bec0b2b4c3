"""The recorded dataflow as a graph of activations, and which additions in it are residual.

Every activation is a :class:`Node` with its immediate dominator: the last activation that every path from
the input to it runs through. That answers most questions:

- the nearest activation two others *both depend on entirely* is where their dominator chains meet;
- the least (or greatest) number of weighted operations on any path from a dominator to a node is the
  difference of their numbers from the input, since every path runs through the dominator.

A branch that also reads something else (cross-attention to a memory, a time embedding, a class token's
attention to the patches) does not depend on its shortcut entirely; there the parents are searched backwards.

Cost: a dominator chain may be as long as the network is deep, so every node also has a *jump pointer* to a
dominator further up (Myers, "An applicative random-access stack", 1983: one pointer a node, O(log depth) steps to
any depth). What a search backwards from one source found of an activation that is read more than once is kept, so
that the next search does not pass it again.

Nothing here knows torch: the rules are tested on graphs written by hand.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple


class Path(NamedTuple):
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


NO_STEP = Path()

_NUMBERS = count()
_UNREAD = 2**63


class Node:
    """One activation: where it came from, and what the recorder knows of it.

    Attributes:
        parents: the activations it was computed from.
        step: what the operation that made it adds to a path.
        level: length of the longest path from the root; every parent's is smaller.
        dominator: the last activation all of this one depends on; None for the root above all inputs.
        jump: a dominator further up; None for the root.
        depth: number of dominators above.
        path: counts from the root.
        touched: how many of it and its dominators are reached from the dominator before by no path that is free of
            weighted and of partial operations.
        whole: how many of them are reached by a path with a weighted operation before any partial one.
        number: how many were made before it.
        readers: number of activations computed from it so far.
        first_reader: number of the first of them; what was made before it comes from elsewhere.
        sums: how many of it and its dominators are residual additions.
        straight: the furthest ancestor before which signals were joined or bent.
        since: what paths from here to others pass, as far as was asked: fewest weighted and fewest partial
            operations, or None for an activation that is not computed from this one.
        note: what the recorder attaches (layout, scaling, statistics).
    """

    __slots__ = (
        "depth",
        "dominator",
        "first_reader",
        "jump",
        "level",
        "note",
        "number",
        "parents",
        "path",
        "readers",
        "since",
        "step",
        "straight",
        "sums",
        "touched",
        "whole",
    )

    def __init__(self, parents: Sequence[Node], step: Path = NO_STEP, note: Any = None) -> None:
        self.parents = tuple(parents)
        self.step = step
        self.note = note
        self.number = next(_NUMBERS)
        self.readers = self.sums = 0
        self.first_reader = _UNREAD
        self.since: dict[Node, tuple[int, int] | None] | None = None
        self.straight = self
        self.dominator: Node | None = None
        self.jump: Node | None = None
        self.level = self.depth = self.touched = self.whole = 0
        self.path = step
        if self.parents:
            self._place()

    def _place(self) -> None:
        """Find the dominator, and count from it on."""
        step, first = self.step, self.parents[0]
        dominator, level, path, single = first, first.level, first.path, True
        first.readers += 1
        first.first_reader = min(first.first_reader, self.number)
        for parent in self.parents:
            if parent is not first:
                single = False
                parent.readers += 1
                parent.first_reader = min(parent.first_reader, self.number)
                dominator = meet(dominator, parent)
                level = max(level, parent.level)
                path = _join(path, parent.path)
        self.level, self.path = level + 1, path if step is NO_STEP else _extend(path, step)
        self.dominator, self.depth, self.jump = dominator, dominator.depth + 1, _jump_from(dominator)
        if single:
            untouched, whole = True, False
            if dominator.dominator is not None and not step.nonlinear:
                self.straight = dominator.straight
        else:
            ways = [_untouched_and_whole(dominator, parent) for parent in self.parents]
            untouched, whole = any(way[0] for way in ways), any(way[1] for way in ways)
        if step.weighted:
            untouched, whole = False, whole or untouched
        elif step.partial:
            untouched = False
        self.sums = dominator.sums
        self.touched = dominator.touched + (not untouched)
        self.whole = dominator.whole + whole

    def dominates(self, other: Node) -> bool:
        """Whether all of ``other`` depends on this node (a node dominates itself)."""
        return dominator_at(other, self.depth) is self


def _join(one: Path, other: Path) -> Path:
    """Of two paths to one place, the less of each count, and the more of mixing."""
    return Path(
        min(one.weighted, other.weighted),
        max(one.mixing, other.mixing),
        min(one.nonlinear, other.nonlinear),
        min(one.partial, other.partial),
    )


def _extend(path: Path, step: Path) -> Path:
    """A path and one more operation."""
    return Path(
        path.weighted + step.weighted,
        path.mixing + step.mixing,
        path.nonlinear + step.nonlinear,
        path.partial + step.partial,
    )


def _jump_from(dominator: Node) -> Node:
    """Where the jump pointer of a node below ``dominator`` points: past two jumps if they are of one length."""
    jump = dominator.jump
    if jump is None or jump.jump is None or dominator.depth - jump.depth != jump.depth - jump.jump.depth:
        return dominator
    return jump.jump


def dominator_at(node: Node, depth: int) -> Node:
    """The dominator of ``node``, or itself, that has so many dominators above; ``node`` if it has fewer."""
    while node.depth > depth:
        assert node.jump is not None
        assert node.dominator is not None
        node = node.jump if node.jump.depth >= depth else node.dominator
    return node


def meet(first: Node, second: Node) -> Node:
    """The nearest activation that both depend on entirely; the root if they have none but it."""
    first, second = dominator_at(first, second.depth), dominator_at(second, first.depth)
    while first is not second:  # their jumps are of one length, since their depths are equal
        assert first.dominator is not None, "two roots in one graph"
        assert second.dominator is not None, "two roots in one graph"
        if first.jump is second.jump:
            first, second = first.dominator, second.dominator
        else:
            assert first.jump is not None
            assert second.jump is not None
            first, second = first.jump, second.jump
    return first


def _untouched_and_whole(ancestor: Node, node: Node) -> tuple[bool, bool]:
    """Whether a path from a dominator passes nothing weighted or partial; whether one is weighted before it is partial.

    Every path runs through all dominators between. So one is untouched if each of these can be reached untouched from
    the one before, and weighted first if one of these can, up to the first that cannot be reached untouched.
    """
    untouched = node.touched == ancestor.touched
    if not untouched:
        while node.dominator is not None and node.dominator.touched > ancestor.touched:
            assert node.jump is not None
            node = node.jump if node.jump.touched > ancestor.touched else node.dominator
    return untouched, node.whole > ancestor.whole


@dataclass(frozen=True)
class Residual:
    """A residual addition: ``ancestor`` reaches it by a shortcut and by a branch.

    Attributes:
        ancestor: the activation both operands were computed from.
        branch: 0 or 1, the operand that is the branch.
        weighted_shortcut: the shortcut is a projection.
        linear: the branch is one straight way of weights beside a projection, as in a low-rank adapter or a
            re-parametrised block. In a network with any nonlinearity the two are one layer, and no block.
    """

    ancestor: Node
    branch: int
    weighted_shortcut: bool
    linear: bool = False


def residual(first: Node, second: Node) -> Residual | None:
    """Decide whether the sum of two activations of one shape is a residual addition.

    It is when both were computed from one ancestor, one of them (the branch) has passed more weighted
    operations since than the other (the shortcut), or as many and more mixing (a branch that only pools),
    and the shortcut is linear (a projection may see its input activated). Excluded so are sums of
    parallel paths of equal standing (re-parametrised convolutions, what several blocks of one stream
    give to a sum beside it), of streams that went separate ways
    through nonlinearities (high-resolution fusion, attention logits), and of different parts of one
    tensor (the hierarchy inside a Res2Net block).

    Args:
        first: one operand.
        second: the other.

    Returns:
        The residual addition, or None.
    """
    found = _with_one_source(first, second)
    nearer = _with_side_input(first, second, above=-1 if found is None else found.ancestor.level)
    return nearer or found


class Additions:
    """The residual additions of one recording so far, in order, and how many of them lie inside a branch.

    Of every addition, the nearest activation is known that it and all later ones depend on. It is the same for runs of
    neighbours, and leads to that of every later run; a new addition joins the last runs, so far as they do not lead
    to it.
    """

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.runs: list[tuple[int, Node]] = []
        """Number of the first addition of each run, and what all additions from there on depend on."""

    def __len__(self) -> int:
        return len(self.nodes)

    def append(self, node: Node) -> None:
        """Enter the sum of an addition before anything is computed from it."""
        start = common = None
        while self.runs and not self.runs[-1][1].dominates(node):
            start, last = self.runs.pop()
            common = common or meet(last, node)  # of the last, and so of all before that do not lead to the sum
        if start is not None and common is not None:
            if self.runs and self.runs[-1][1] is common:
                start, _ = self.runs.pop()
            self.runs.append((start, common))
        self.runs.append((len(self.nodes), node))
        self.nodes.append(node)
        assert node.dominator is not None
        node.sums = node.dominator.sums + 1

    def count_enclosed(self, ancestor: Node, shortcut: Node) -> int:
        """How many additions lie inside a branch: depend on its ancestor, and the shortcut not on them.

        Args:
            ancestor: where branch and shortcut part.
            shortcut: the other operand of the addition.
        """
        first = bisect_right(self.nodes, ancestor.number, key=lambda node: node.number)
        if first == len(self.nodes):
            return 0
        run = bisect_right(self.runs, first, key=lambda each: each[0]) - 1
        if ancestor.dominates(self.runs[run][1]):
            inside = len(self.nodes) - first
        else:  # another stream runs beside
            inside = sum(ancestor.dominates(node) for node in self.nodes[first:])
        return inside - (shortcut.sums - ancestor.sums)


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
    return _residual_of(ancestor, branch, (first, second)[branch], shortcut)


def _residual_of(ancestor: Node, branch: int, end: Node, shortcut: Path) -> Residual:
    """The addition of a branch that ends in an activation."""
    return Residual(
        ancestor, branch, shortcut.weighted > 0, shortcut.weighted > 0 and end.straight.level <= ancestor.level
    )


def _is_projection_of_activated(node: Node, ancestor: Node) -> bool:
    """Whether every nonlinearity since the ancestor came before the first weighted operation.

    A pre-activation block that projects its shortcut may activate shortcut and branch each for itself.
    """
    end, weighted = node, ancestor.path.weighted
    while node.path.weighted > weighted:
        assert node.jump is not None, "an ancestor dominates its shortcut"
        assert node.dominator is not None, "an ancestor dominates its shortcut"
        node = node.jump if node.jump.path.weighted > weighted else node.dominator
    return node is not end and node.path.nonlinear == end.path.nonlinear


def _starts_from_part(node: Node, ancestor: Node) -> bool:
    """Whether a part was taken of the ancestor before any weighted operation, on every path from it.

    A part of what the whole was turned into (the residual half of a dual-path block, the keys of class
    attention) is no part of the ancestor.
    """
    return not any(_untouched_and_whole(ancestor, node))


def _with_side_input(first: Node, second: Node, *, above: int) -> Residual | None:
    """One operand leads straight back to an activation that the other was computed from, above a level."""
    for branch, (node, shortcut) in enumerate(((first, second), (second, first))):
        found = _nearest_source(shortcut, node, above)
        if found is None:
            continue
        ancestor, weighted, partial = found
        straight = shortcut.path - ancestor.path
        if straight.weighted and meet(ancestor, node).dominator is not None:
            continue  # two layers that read one stream at different places: parallel paths
        if weighted > straight.weighted and not (partial and straight.partial):
            return _residual_of(ancestor, branch, node, straight)
    return None


def _nearest_source(shortcut: Node, node: Node, above: int) -> tuple[Node, int, int] | None:
    """The nearest activation straight before ``shortcut`` that ``node`` was computed from, but not itself.

    Args:
        shortcut: where the way back begins; it ends where signals were last joined or bent.
        node: what was computed from the activation.
        above: the level of the activation must be greater.

    Returns:
        It, and the fewest weighted and the fewest partial operations from it to ``node``.
    """
    nearest, readers = shortcut, shortcut.readers
    while readers == 0:  # read on the way alone: no other activation was computed from it
        if nearest is shortcut.straight:
            return None
        nearest = nearest.parents[0]
        readers = nearest.readers - 1
    lowest, highest = max(above + 1, shortcut.straight.level), min(node.level - 1, nearest.level)
    if lowest > highest:
        return None
    # On a straight way levels and depths go up one by one.
    nearest = dominator_at(nearest, nearest.depth - (nearest.level - highest))
    since = _since(nearest, node)
    furthest = dominator_at(nearest, nearest.depth - (highest - lowest))
    if since is None and nearest is not furthest and (at_furthest := _since(furthest, node)) is not None:
        since = at_furthest
        while nearest.depth > furthest.depth + 1:  # what was computed from one was computed from all before it
            middle = dominator_at(nearest, (nearest.depth + furthest.depth) // 2)
            if (at_middle := _since(middle, node)) is None:
                nearest = middle
            else:
                furthest, since = middle, at_middle
        nearest = furthest
    return None if since is None else (nearest, *since)


def _since(source: Node, node: Node) -> tuple[int, int] | None:
    """The fewest weighted and the fewest partial operations on any path between two activations; None without a path.

    What the source does not dominate is searched backwards, past all that one way alone leads to.
    """
    found: dict[Node, tuple[int, int] | None] = {}
    waiting = [node]
    while waiting:
        place = _place_of(source, waiting[-1], found)
        if not isinstance(place, Node):
            waiting.pop()
            continue
        before = [_place_of(source, parent, found) for parent in place.parents]
        unknown = [each for each in before if isinstance(each, Node)]
        if unknown:
            waiting += unknown
            continue
        paths = [each for each in before if each is not None and not isinstance(each, Node)]
        found[place] = None
        if paths:
            weighted, partial = min(path[0] for path in paths), min(path[1] for path in paths)
            found[place] = weighted + place.step.weighted, partial + place.step.partial
    known = _place_of(source, node, found)
    assert not isinstance(known, Node)
    last = next(reversed(found), None)
    kept = {place: path for place, path in found.items() if place.readers > 1 or place is last}
    source.since = {} if source.since is None else source.since
    source.since.update(kept)  # later searches come by these, not by what has been read once
    return known


def _place_of(source: Node, node: Node, found: dict[Node, tuple[int, int] | None]) -> tuple[int, int] | Node | None:
    """What is known of the paths from ``source`` to ``node``, or else the activation to search before."""
    if node.level <= source.level or node.number < source.first_reader:
        return (0, 0) if node is source else None
    common = meet(source, node)
    entry, since = source, (0, 0)
    if common is not source:  # all paths run through the first dominator of the node that is none of the source
        entry = dominator_at(node, common.depth + 1)
        if entry.level <= source.level or entry.number < source.first_reader:
            return None
        if entry in found:
            since = found[entry]
        elif source.since is not None and entry in source.since:
            since = source.since[entry]
        else:
            return entry
    if since is None:
        return None
    passed = node.path - entry.path
    return since[0] + passed.weighted, since[1] + passed.partial
