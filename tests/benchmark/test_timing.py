"""Times of calls in turns: order, budget, and the numbers made of them."""

from __future__ import annotations

import pytest

from normfree.benchmark import interleaved, ratios, shown, spread


def test_calls_take_turns():
    order = []
    times = interleaved(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3, clock=lambda call: call() or 1.0
    )
    assert order == ["a", "b"] * 3
    assert times == {"a": [1.0] * 3, "b": [1.0] * 3}


@pytest.mark.parametrize(("budget", "rounds"), [(0.0, 3), (60.0, 9)])
def test_a_spent_budget_leaves_three_rounds(budget, rounds):
    times = interleaved({"a": lambda: None}, rounds=9, budget=budget)
    assert len(times["a"]) == rounds


def test_numbers_by_hand():
    assert ratios([2.0, 9.0], [1.0, 3.0]) == [2.0, 3.0]
    assert spread([1.0, 2.0, 3.0, 4.0, 10.0]) == {"median": 3.0, "q1": 2.0, "q3": 4.0, "min": 1.0, "max": 10.0}
    assert spread([7.0])["q1"] == 7.0
    assert shown(spread([1.0, 2.0, 3.0]), 1) == "2.0 (1.5 to 2.5)"
