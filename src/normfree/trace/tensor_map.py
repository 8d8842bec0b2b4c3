"""Values kept for tensors, by identity, and only as long as each tensor lives.

As ``torch.utils.weak.WeakTensorKeyDictionary``, at a tenth of its cost: every operation that is recorded asks several
times, and a comparison of tensors by a method of a key class in Python was a third of a recording.
"""

from __future__ import annotations

from typing import Generic, TypeVar
from weakref import ref

from torch import Tensor

Value = TypeVar("Value")


class _Key(ref):
    """A weak reference that knows where its tensor's value is kept."""

    __slots__ = ("place",)
    place: int


class TensorMap(Generic[Value]):
    """A mapping from tensors, compared by identity; an entry goes with its tensor."""

    __slots__ = ("__weakref__", "_forget", "_keys", "_values")

    def __init__(self) -> None:
        self._values: dict[int, Value] = {}
        self._keys: dict[int, _Key] = {}
        this = ref(self)

        def forget(key: _Key) -> None:
            map_ = this()
            if map_ is not None:
                map_._values.pop(key.place, None)
                map_._keys.pop(key.place, None)

        self._forget = forget

    def __contains__(self, tensor: Tensor) -> bool:
        return id(tensor) in self._values

    def __getitem__(self, tensor: Tensor) -> Value:
        return self._values[id(tensor)]

    def __setitem__(self, tensor: Tensor, value: Value) -> None:
        place = id(tensor)
        if place not in self._keys:
            self._keys[place] = key = _Key(tensor, self._forget)
            key.place = place
        self._values[place] = value

    def __len__(self) -> int:
        return len(self._values)

    def get(self, tensor: Tensor) -> Value | None:
        """The tensor's value, or None."""
        return self._values.get(id(tensor))

    def pop(self, tensor: Tensor) -> Value | None:
        """Take the tensor's value out."""
        self._keys.pop(id(tensor), None)
        return self._values.pop(id(tensor), None)
