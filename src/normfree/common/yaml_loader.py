"""YAML that somebody else wrote, read in time and memory of the order of its length."""

from __future__ import annotations

from collections import Counter
from typing import Any

from normfree.common.checks import require

MOST_NODES, DEEPEST = 100_000, 64
"""Values in a file, and values in values, at most: PyYAML reads some 50,000 a second."""

LONGEST_NUMBER = 18
"""Characters of a whole number at most: the hash of no two such numbers is the same but a few times."""


def bounded_loader(what: str) -> Any:
    """Return a loader of PyYAML for plain values, whose errors are of its kind, or of any kind of a wrong tag's value.

    It refuses aliases, which may grow without bound; more than so many values, and deeper ones; long whole numbers, of
    which many fall on one place in a dict; and a key that comes twice.

    Args:
        what: is read.

    Raises:
        ImportError: PyYAML is not installed.
    """
    yaml: Any = require("yaml", what)

    class Loader(yaml.SafeLoader):
        """As the function says."""

        nodes = depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError("it has an alias (*name)")
            self.nodes, self.depth = self.nodes + 1, self.depth + 1
            if self.nodes > MOST_NODES or self.depth > DEEPEST:
                raise yaml.YAMLError(f"it has more than {MOST_NODES:,} values, or more than {DEEPEST} in each other")
            node = super().compose_node(parent, index)
            self.depth -= 1
            if node.tag == "tag:yaml.org,2002:int" and len(node.value) > LONGEST_NUMBER:
                raise yaml.YAMLError(f"it has a number of {len(node.value):,} characters")
            return node

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            mapping = super().construct_mapping(node, deep=deep)
            if len(mapping) < len(node.value):
                keys = Counter(self.construct_object(key) for key, _ in node.value)
                raise yaml.YAMLError(f"it has {keys.most_common(1)[0][0]} twice")
            return mapping

    return Loader
