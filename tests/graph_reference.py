"""The rules of residual additions by definition: dominators by deletion, paths and regions by search, no shortcut.

Slow, and independent of how :mod:`normfree.trace.graph` is built: an activation is its number, larger than its
parents'; 0 is the root.
"""

from __future__ import annotations

from collections.abc import Sequence

from normfree.trace.graph import Path


class Reference:
    """A graph of activations.

    Args:
        parents: of each activation; none of the root.
        steps: what the operation that made each adds to a path.
    """

    def __init__(self, parents: Sequence[Sequence[int]], steps: Sequence[Path]) -> None:
        self.parents, self.steps = parents, steps
        self.levels = [0] * len(parents)
        for node, above in enumerate(parents):
            self.levels[node] = 1 + max((self.levels[parent] for parent in above), default=-1)
        everything = range(len(parents))
        reached = {gone: self._reached_without(gone) for gone in everything}
        self.dominators = [{above for above in everything if node not in reached[above]} for node in everything]

    def _reached_without(self, gone: int) -> set[int]:
        """All that some path from the root leads to that avoids one activation."""
        reached = {0} - {gone}
        for node, above in enumerate(self.parents):
            if node != gone and reached.intersection(above):
                reached.add(node)
        return reached

    def behind(self, node: int) -> set[int]:
        """An activation and all that it was computed from."""
        seen, waiting = {node}, [node]
        while waiting:
            new = set(self.parents[waiting.pop()]) - seen
            seen |= new
            waiting += new
        return seen

    def meet(self, first: int, second: int) -> int:
        """The nearest common dominator."""
        return max(self.dominators[first] & self.dominators[second], key=lambda each: len(self.dominators[each]))

    def since(self, ancestor: int, node: int) -> Path:
        """The least of each count, and the most of mixing, over all paths from one activation to another."""
        paths = {ancestor: Path()}
        for later in sorted(self.behind(node)):
            before = [paths[parent] for parent in self.parents[later] if parent in paths]
            if before:
                step = self.steps[later]
                paths[later] = Path(
                    min(path.weighted for path in before) + step.weighted,
                    max(path.mixing for path in before) + step.mixing,
                    min(path.nonlinear for path in before) + step.nonlinear,
                    min(path.partial for path in before) + step.partial,
                )
        return paths[node]

    def residual(self, first: int, second: int) -> tuple[int, int, bool] | None:
        """Ancestor, branch (0 or 1) and whether the shortcut is a projection."""
        found = [each for each in (self._one_source(first, second), self._side_input(first, second)) if each]
        return max(found, key=lambda each: self.levels[each[0]], default=None)

    def _one_source(self, first: int, second: int) -> tuple[int, int, bool] | None:
        ancestor = self.meet(first, second)
        if ancestor == 0:
            return None
        since = [self.since(ancestor, first), self.since(ancestor, second)]
        effort = [(path.weighted, path.mixing) for path in since]
        if effort[0] == effort[1]:
            return None
        branch = 0 if effort[0] > effort[1] else 1
        shortcut, ends = since[1 - branch], (first, second)
        if shortcut.nonlinear and not self._is_projection_of_activated(ends[1 - branch], ancestor):
            return None
        if shortcut.partial and self._starts_from_part(ends[branch], ancestor):
            return None
        return ancestor, branch, shortcut.weighted > 0

    def _is_projection_of_activated(self, node: int, ancestor: int) -> bool:
        """The first weighted operation comes after the last activation that nothing weighted leads to."""
        between = self.dominators[node] - self.dominators[ancestor] | {ancestor}
        unweighted = [each for each in between if not self.since(ancestor, each).weighted]
        last = max(unweighted, key=lambda each: len(self.dominators[each]))
        return last != node and self.since(ancestor, last).nonlinear == self.since(ancestor, node).nonlinear

    def _starts_from_part(self, node: int, ancestor: int) -> bool:
        """No path from the ancestor is whole, or weighted while it still is."""
        states: dict[int, set[str]] = {ancestor: {"untouched"}}
        for later in sorted(self.behind(node)):
            for parent in self.parents[later]:
                for state in states.get(parent, ()):
                    if state == "untouched":
                        step = self.steps[later]
                        state = "whole" if step.weighted else "part" if step.partial else "untouched"
                    states.setdefault(later, set()).add(state)
        return states[node] == {"part"}

    def _straight_way(self, node: int) -> list[int]:
        """The way back to where signals were last joined or bent."""
        way = [node]
        while len(set(self.parents[way[-1]])) == 1 and not self.steps[way[-1]].nonlinear:
            if self.parents[way[-1]][0] == 0:
                break
            way.append(self.parents[way[-1]][0])
        return way

    def _side_input(self, first: int, second: int) -> tuple[int, int, bool] | None:
        for branch, (node, shortcut) in enumerate(((first, second), (second, first))):
            way = self._straight_way(shortcut)
            behind = self.behind(node) - {node}
            ancestor = next((each for each in way if each in behind), None)
            if ancestor is None:
                continue
            since, straight = self.since(ancestor, node), self.since(ancestor, shortcut)
            if straight.weighted and self.meet(ancestor, node) != 0:
                continue
            if since.weighted > straight.weighted and not (since.partial and straight.partial):
                return ancestor, branch, straight.weighted > 0
        return None
