"""What is read of somebody else's YAML, and what is not."""

import pytest
import yaml

from normfree.common.yaml_loader import DEEPEST, LONGEST_NUMBER, MOST_NODES, bounded_loader

NESTED = "[" * (DEEPEST - 1) + "]" * (DEEPEST - 1)


def load(text):
    return yaml.load(text, bounded_loader("a test"))


def test_plain_values_are_read():
    text = f"a: {{b: [1, 2.5, yes, null, word, 2020-01-01]}}\nn: {'9' * LONGEST_NUMBER}\nd: {NESTED}\n"
    assert load(text) == yaml.safe_load(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &a [1]\nb: *a", "alias"),
        (f"[{'1,' * MOST_NODES}]", "100,000 values"),
        (f"[[{NESTED}]]", "64 in each other"),
        ("a: 1" + "0" * LONGEST_NUMBER, "a number of 19 characters"),
        ("a: {1: 2, 0x1: 3}", "1 twice"),
        ("a: 1\nb: 2\na: 3", "a twice"),
    ],
)
def test_what_may_take_long_or_be_meant_otherwise_is_refused(text, message):
    with pytest.raises(yaml.YAMLError, match=message):
        load(text)
