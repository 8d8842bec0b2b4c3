"""A value is found by the very tensor, and gone with it."""

from __future__ import annotations

import gc
import weakref

import torch

from normfree.trace.scaling import TensorMap


def test_by_identity():
    known: TensorMap[int] = TensorMap()
    one, equal = torch.zeros(3), torch.zeros(3)
    known[one] = 1
    assert one in known
    assert known[one] == known.get(one) == 1
    assert equal not in known
    assert known.get(equal) is None
    known[one] = 2
    assert known[one] == 2
    assert len(known) == 1
    assert known.pop(one) == 2
    assert one not in known


def test_an_entry_goes_with_its_tensor_and_its_place_can_be_taken_again():
    known: TensorMap[int] = TensorMap()
    places = set()
    for number in range(100):
        tensor = torch.zeros(1)
        assert tensor not in known
        known[tensor] = number
        places.add(id(tensor))
        del tensor
        assert len(known) == 0
    assert len(places) < 100  # some were taken again, so an entry that stayed would have been found


def test_a_tensor_that_only_other_tensors_hold_keeps_its_value():
    known: TensorMap[str] = TensorMap()
    base = torch.zeros(2, 2)
    known[base] = "base"
    view = base[0]
    del base
    gc.collect()
    assert known[view._base] == "base"
    del view
    assert len(known) == 0


def test_neither_the_tensor_nor_the_map_is_kept_alive():
    known: TensorMap[str] = TensorMap()
    tensor = torch.zeros(1)
    known[tensor] = "value"
    dead = weakref.ref(known)
    del known
    assert dead() is None
    del tensor
