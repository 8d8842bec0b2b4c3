"""Whatever a model holds, and however its forward changes that, a measurement gives it back: the same things, the same
bits; and what cannot be put back keeps nothing else from being put back, and is named."""

from __future__ import annotations

import array
import collections
import dataclasses
import functools
import logging
import random
import threading
import types
import warnings
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from normfree.convert.dataflow import run_prepared
from normfree.signal import spp
from normfree.trace import held

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


class Holder(nn.Module):
    """A residual network with a thing, and a forward that changes it."""

    def __init__(self, thing, change) -> None:
        super().__init__()
        self.layer, self.thing, self.change = nn.Linear(6, 6), thing, change

    def forward(self, x):
        self.change(self, x)
        return x + self.layer(x)


def bits(tensor):
    """All bytes of the memory that a tensor looks at."""
    return bytes(tensor.detach().untyped_storage().tolist())


def seen(value, known=None):
    """All that can be reached from a value, as plain data: identities, orders, bits and states."""
    known = {} if known is None else known
    if id(value) in known:
        return ("again", id(value))
    known[id(value)] = value
    kind = type(value)
    if isinstance(value, (int, float, str, bytes, type(None), type, torch.dtype, types.ModuleType)):
        return value
    found = [kind, id(value)]
    if isinstance(value, Tensor) and not is_lazy(value):
        found += [tuple(value.shape), value.dtype, value.requires_grad]
        found += [str(value)] if value.is_sparse else [value.stride(), value.storage_offset(), bits(value)]
        found += [seen(value.grad, known)] if value.is_leaf else []
    elif isinstance(value, np.ndarray):
        found += [value.shape, value.flags.writeable, value.tobytes(), seen(value.base, known)]
        found += [seen(item, known) for item in value.flat] if value.dtype == object else []
    elif isinstance(value, np.random.Generator):
        found += [str(value.bit_generator.state)]
    elif isinstance(value, np.random.RandomState):
        found += [str(value.get_state())]
    elif isinstance(value, random.Random) and not isinstance(value, random.SystemRandom):
        found += [value.getstate()]
    elif isinstance(value, torch.Generator):
        found += [bytes(value.get_state().numpy())]
    elif isinstance(value, dict):
        found += [[(key, seen(item, known)) for key, item in value.items()]]
    elif isinstance(value, (set, frozenset)):
        found += [sorted(map(id, value))]
    elif isinstance(value, (list, tuple, collections.deque, array.array, bytearray)):
        found += [[seen(item, known) for item in value]]
    elif isinstance(value, types.FunctionType):
        found += [
            [seen(cell.cell_contents, known) for cell in value.__closure__ or ()],
            seen(value.__defaults__, known),
        ]
    elif isinstance(value, (types.MethodType, types.BuiltinMethodType)):
        found += [seen(value.__self__, known)]
    elif isinstance(value, functools.partial):
        found += [seen(value.func, known), seen(value.args, known), seen(value.keywords, known)]
    if hasattr(value, "__dict__"):
        found += [[(name, seen(item, known)) for name, item in vars(value).items()]]
    for slot in getattr(kind, "__slots__", ()):
        found += [(slot, seen(getattr(value, slot), known) if hasattr(value, slot) else "empty")]
    return found


@dataclasses.dataclass
class Cache:
    keys: list
    length: int = 0


@dataclasses.dataclass(frozen=True)
class Frozen:
    keys: list
    length: int = 0


@dataclasses.dataclass(slots=True)
class Slots:
    keys: list
    length: int = 0
    more: object = dataclasses.field(init=False)


class Strict:
    """Takes no attribute once it has been made."""

    def __init__(self) -> None:
        self.__dict__["count"] = 0

    def __setattr__(self, name, value):
        raise AttributeError("this object cannot be changed")


class StrictDict(dict):
    def __setitem__(self, key, value):
        raise TypeError("this mapping cannot be changed")

    def clear(self):
        raise TypeError("this mapping cannot be changed")

    update = pop = clear


class Named(list):
    name = "before"


class Counter:
    def __init__(self) -> None:
        self.count = 0

    def add(self):
        self.count += 1


def nested():
    inner = types.SimpleNamespace(keys=torch.zeros(2), more=None)
    return {"layers": [Cache([torch.ones(2)]), (inner, {1, 2})], 7: inner}


def change_nested(module, x):
    cache, (inner, some) = module.thing["layers"]
    cache.keys[0].mul_(3)
    cache.keys.append(x)
    cache.length += 1
    inner.keys[0], inner.more = 7, module.thing
    some.add(x)
    module.thing["layers"].reverse()
    module.thing["x"] = x


def cycle():
    one, other = types.SimpleNamespace(n=0), []
    one.other = other
    other.append(one)
    return one


def change_cycle(module, x):
    module.thing.n += 1
    module.thing.other.append(module)


def change_slots(module, x):
    module.thing.keys.append(x)
    module.thing.more = x
    del module.thing.length


def change_frozen(module, x):
    object.__setattr__(module.thing, "length", 3)
    module.thing.keys.append(x)


def change_strict_dict(module, x):
    dict.__setitem__(module.thing, "b", x)
    dict.__delitem__(module.thing, "a")


def change_named(module, x):
    module.thing.append(x)
    module.thing.name = "after"


def move(module, x):
    module.thing.move_to_end("a")


def change_deque(module, x):
    module.thing.append(x)
    module.thing.rotate(1)


def writing(index=..., value=9):
    """A change that writes into the thing."""

    def change(module, x):
        module.thing[index] = value

    return change


def calling(*names, **named):
    """A change that calls methods of the thing."""

    def change(module, x):
        for name in names:
            getattr(module.thing, name)(**named)

    return change


def counting():
    """A function with a variable of the one around it."""
    count, log = 0, []

    def hook(default=[]):  # noqa: B006
        nonlocal count
        count += 1
        log.append(count)
        default.append(count)

    return hook


def call(module, x):
    module.thing()


def reshape(module, x):
    module.thing.shape = (2, 3)
    module.thing[0, 0] = 5


def grow(module, x):
    module.thing.resize((9,), refcheck=False)
    module.thing[:] = 1


def lock_array(module, x):
    module.thing[0] = 4
    module.thing.flags.writeable = False


def hidden_network():
    return (nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5)),)


def run_hidden(module, x):
    module.thing[0].train()(x)
    module.thing[0][0].weight.data.mul_(2)
    module.thing[0].eval()


def for_inference():
    with torch.inference_mode():
        return torch.ones(3)


class Closed:
    @property
    def __dict__(self):
        raise RuntimeError("there is nothing to see")


THINGS = {
    "list of tensors": (lambda: [torch.zeros(2)], lambda module, x: module.thing.append(x)),
    "tensor in a list": (lambda: [torch.zeros(2)], lambda module, x: module.thing[0].add_(1)),
    "tensor in a dict through a view": (lambda: {"k": torch.zeros(4)}, lambda m, x: m.thing["k"].view(2, 2).fill_(2)),
    "tensor by NumPy": (lambda: [torch.zeros(4)], lambda module, x: module.thing[0].numpy().fill(3)),
    "negative zero": (lambda: [torch.tensor([-0.0])], lambda module, x: module.thing[0].numpy().fill(0.0)),
    "NaN": (lambda: [torch.tensor([float("nan")])], lambda module, x: module.thing[0].zero_()),
    "half precision": (lambda: [torch.ones(3).half()], lambda module, x: module.thing[0].zero_()),
    "complex": (lambda: [torch.ones(3, dtype=torch.complex128)], lambda module, x: module.thing[0].zero_()),
    "sparse": (lambda: [torch.eye(3).to_sparse()], lambda module, x: module.thing[0].mul_(3)),
    "repeated": (lambda: [torch.zeros(1).expand(10**12)], lambda module, x: module.thing[0][:1].add_(1)),
    "tensor resized": (lambda: [torch.ones(6)], lambda module, x: module.thing[0].resize_(20)),
    "tensor shrunk": (lambda: [torch.ones(6)], lambda module, x: module.thing[0].resize_(2).zero_()),
    "tensor transposed": (lambda: [torch.eye(3)], lambda module, x: module.thing[0].t_()),
    "tensor set": (lambda: [torch.ones(6)], lambda module, x: module.thing[0].set_(torch.zeros(3))),
    "tensor of other data": (lambda: [torch.ones(6)], lambda m, x: setattr(m.thing[0], "data", torch.zeros(2))),
    "tensor without memory": (lambda: [torch.ones(6)], lambda m, x: m.thing[0].untyped_storage().resize_(0)),
    "tensor that learns": (lambda: [torch.ones(6, requires_grad=True)], lambda m, x: m.thing[0].requires_grad_(False)),
    "tensor's attribute": (lambda: [torch.ones(6)], lambda module, x: setattr(module.thing[0], "note", x)),
    "nested": (nested, change_nested),
    "cycle": (cycle, change_cycle),
    "dataclass": (lambda: Cache([]), lambda module, x: setattr(module.thing, "keys", [x])),
    "frozen dataclass": (lambda: Frozen([]), change_frozen),
    "slots": (lambda: Slots([torch.ones(1)]), change_slots),
    "no setattr": (Strict, lambda module, x: module.thing.__dict__.update(count=1)),
    "another class": (Counter, lambda module, x: setattr(module.thing, "__class__", Strict)),
    "dict that refuses": (lambda: StrictDict(a=1), change_strict_dict),
    "list with attributes": (lambda: Named([1]), change_named),
    "default dict": (lambda: collections.defaultdict(list), lambda module, x: module.thing["a"].append(x)),
    "ordered dict": (lambda: collections.OrderedDict(a=1, b=2), move),
    "dict in another order": (lambda: {"a": 1, "b": 2}, lambda m, x: m.thing.update(a=m.thing.pop("a"))),
    "counter": (lambda: collections.Counter("aab"), lambda module, x: module.thing.update("b")),
    "user dict": (lambda: collections.UserDict(a=1), writing("a")),
    "deque": (lambda: collections.deque([1, 2], maxlen=2), change_deque),
    "set": (lambda: {1, 2}, lambda module, x: module.thing.add(x)),
    "bytearray": (lambda: bytearray(b"abc"), writing(0)),
    "array": (lambda: array.array("d", [1.0, 2.0]), lambda module, x: module.thing.append(3.0)),
    "NumPy array": (lambda: np.arange(6.0), writing()),
    "NumPy array of no axes": (lambda: np.array(1.0), writing()),
    "NumPy array reshaped": (lambda: np.arange(6.0), reshape),
    "NumPy array resized": (lambda: np.arange(6.0), grow),
    "NumPy array locked": (lambda: np.arange(6.0), lock_array),
    "NumPy view": (lambda: np.arange(12.0)[::2], lambda module, x: module.thing.base.fill(1)),
    "NumPy array of things": (lambda: np.array([[1], {}], dtype=object), lambda m, x: m.thing[0].append(2)),
    "NumPy records": (lambda: np.zeros(2, [("a", "f4"), ("b", "i8")]), lambda m, x: m.thing["b"].fill(3)),
    "NumPy dates": (lambda: np.zeros(2, "datetime64[s]"), writing(0, np.datetime64(5, "s"))),
    "NumPy's generator": (lambda: np.random.default_rng(0), calling("random")),
    "NumPy's older generator": (lambda: np.random.RandomState(0), calling("standard_normal")),
    "Python's generator": (lambda: random.Random(0), calling("random", "random")),
    "the system's generator": (random.SystemRandom, calling("random")),
    "torch's generator": (torch.Generator, lambda module, x: torch.rand(1, generator=module.thing)),
    "function": (counting, call),
    "partial": (lambda: functools.partial(list.append, [], 1), call),
    "method": (lambda: Counter().add, call),
    "method of a list": (lambda: functools.partial([1].append, 2), call),
    "hidden network": (hidden_network, run_hidden),
    "hidden network of no sizes yet": (lambda: [nn.LazyLinear(3)], lambda module, x: module.thing[0](x)),
}  # fmt: skip


@pytest.mark.parametrize("name", THINGS)
def test_a_thing_is_given_back(name):
    make, change = THINGS[name]
    torch.manual_seed(0)
    model = Holder(make(), change)
    before = seen(model.thing)
    change(Holder(model.thing, change), X)
    assert seen(model.thing) != before or name == "the system's generator", "the change is one"
    model = Holder(make(), change)
    before = seen(vars(model))
    spp(model, X)
    assert seen(vars(model)) == before
    run_prepared(model, X)
    assert seen(vars(model)) == before


class OwnTensors(nn.Module):
    """A residual network whose forward does something to its own parameters, buffers and modules."""

    __slots__ = ("slot",)

    def __init__(self, act) -> None:
        super().__init__()
        self.layer, self.act = nn.Linear(6, 6), act
        self.register_buffer("seen", torch.arange(6.0))
        self.register_buffer("mask", torch.zeros(1, 1).expand(6, 6))
        self.register_parameter("late", None)

    def forward(self, x):
        y = x + self.layer(x)
        with torch.no_grad():
            self.act(self)
        return y


def give_up_and_take_again(m):
    m.seen.untyped_storage().resize_(0)
    m.seen.untyped_storage().resize_(24)
    m.seen.zero_()


def change_class(m):
    m.__class__ = type("Other", (OwnTensors,), {})


ACTS = {
    "buffer grown": lambda m: m.seen.resize_(50),
    "buffer shrunk": lambda m: m.seen.resize_(2).zero_(),
    "buffer elsewhere": lambda m: m.seen.set_(torch.zeros(3)),
    "buffer with other data": lambda m: setattr(m.seen, "data", torch.zeros(2, dtype=torch.float64)),
    "buffer turned": lambda m: m.mask.t_(),
    "buffer without memory": lambda m: m.seen.untyped_storage().resize_(0),
    "buffer given up and taken again": give_up_and_take_again,
    "buffer exchanged": lambda m: setattr(m, "seen", m.seen + 1),
    "buffer added": lambda m: m.register_buffer("more", torch.zeros(2)),
    "buffer deleted": lambda m: delattr(m, "seen") if hasattr(m, "seen") else None,
    "parameter with other data": lambda m: setattr(m.layer.weight, "data", m.layer.weight.data.double()),
    "parameter resized": lambda m: m.layer.bias.requires_grad_(False).resize_(9),
    "parameter turned": lambda m: m.layer.weight.t_(),
    "parameter written": lambda m: m.layer.weight.mul_(2),
    "parameter exchanged": lambda m: setattr(m.layer, "bias", nn.Parameter(torch.zeros(6))),
    "parameter added": lambda m: setattr(m, "late", nn.Parameter(torch.zeros(6))),
    "parameter frozen": lambda m: m.layer.weight.requires_grad_(False),
    "parameter with a note": lambda m: setattr(m.layer.weight, "note", 1),
    "gradient written": lambda m: m.layer.weight.grad.zero_(),
    "gradient exchanged": lambda m: setattr(m.layer.weight, "grad", torch.zeros(6, 6)),
    "gradient dropped": lambda m: setattr(m.layer.weight, "grad", None),
    "module added": lambda m: m.add_module("more", nn.Linear(1, 1)),
    "module exchanged": lambda m: setattr(m, "layer", nn.Linear(6, 6)),
    "hook added": lambda m: m.layer.register_forward_hook(print),
    "another class": change_class,
    "slot": lambda m: setattr(m, "slot", 1),
}  # fmt: skip


@pytest.mark.parametrize("name", ACTS)
def test_its_own_tensors_and_modules_are_given_back(name):
    model = OwnTensors(ACTS[name])
    model.layer.weight.grad = torch.ones(6, 6)
    before = [seen(module) for module in model.modules()]
    run_prepared(model, X)
    assert [seen(module) for module in model.modules()] == before


def test_what_two_modules_share_stays_shared():
    shared, log = Counter(), []
    model = nn.Sequential(*(Holder(thing, lambda m, x: (m.thing[0].add(), m.thing[1].append(x))) for thing in (
        (shared, log), (shared, log),
    )))  # fmt: skip
    spp(model, X)
    assert all(module.thing[0] is shared and module.thing[1] is log for module in model)
    assert (shared.count, log) == (0, [])


def test_what_cannot_be_copied_is_no_obstacle(tmp_path):
    file = (tmp_path / "log").open("w")
    model = Holder(
        {"lock": threading.Lock(), "file": file, "numbers": iter([1, 2])}, lambda m, x: m.thing["file"].write("x")
    )
    before = seen(vars(model))
    spp(model, X)
    assert seen(vars(model)) == before
    assert next(model.thing["numbers"]) == 1
    file.close()


ODD = {
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    "nested tensor": lambda: torch.nested.nested_tensor([torch.ones(3)]),
    "conjugated": lambda: torch.ones(3, dtype=torch.complex64).conj(),
    "tensor for inference": for_inference,
    "tensor without values": lambda: torch.ones(3, device="meta"),
    "array that repeats": lambda: np.broadcast_to(np.zeros(4), (10**12, 4)),
    "mock": MagicMock,
    "no attributes to be had": Closed,
    "logger": lambda: logging.getLogger("normfree.test"),
    "thread": threading.Thread,
    "scripted": lambda: torch.jit.script(nn.Linear(6, 6)),
    "traced": lambda: torch.fx.symbolic_trace(nn.Linear(6, 6)),
}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning", "ignore:.*quantize.*:UserWarning")
def test_odd_things_are_no_obstacle(name):
    thing = ODD[name]()
    model = Holder([thing], lambda module, x: None)
    spp(model, X)
    assert model.thing[0] is thing


def test_memory_that_cannot_be_written_to_is_left_alone(tmp_path):
    np.save(tmp_path / "table.npy", np.ones((6, 6), np.float32))
    table = np.load(tmp_path / "table.npy", mmap_mode="r")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, that writing to it is undefined
        tensor = torch.from_numpy(table)
    model = Holder([table, tensor], lambda module, x: None)
    model.register_buffer("table", tensor)
    spp(model, X)  # a write would end the process
    assert model.table is tensor


def test_leaves_in_lists_take_no_gradient():
    """Also where the backward pass is a whole one, as within a re-entrant checkpoint."""
    prompts = [torch.ones(6, requires_grad=True)]

    class Prompted(nn.Module):
        def __init__(self):
            super().__init__()
            self.prompts, self.layer = prompts, nn.Linear(6, 6)

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(lambda y: y + self.layer(y + prompts[0]), x, use_reentrant=True)

    called = []
    prompts[0].register_hook(lambda gradient: called.append(gradient))
    result = spp(nn.Sequential(Prompted(), Prompted()), X)
    assert result.configuration["gradient"] is True
    assert prompts[0].grad is None
    assert not called


def test_the_walk_is_bounded(monkeypatch):
    monkeypatch.setattr(held, "MOST_VALUES", 1000)
    near, far = [1], [[index] for index in range(2000)]
    model = Holder([near, far], lambda module, x: (module.thing[0].append(x), module.thing[1][7].append(x)))
    spp(model, X, gradient=False)
    assert near == [1]
    assert len(far[7]) > 1, "more than are looked at, as the documentation says"


def test_what_is_too_large_to_be_copied_is_kept_when_it_is_written(monkeypatch):
    monkeypatch.setattr(held, "MOST_BYTES", 100)
    small, large, array_ = torch.zeros(4), torch.zeros(1000), np.zeros(1000)
    copied = []
    monkeypatch.setattr(
        held.KeptTensor,
        "copy_numbers",
        lambda self, real=held.KeptTensor.copy_numbers: (copied.append(self.value), real(self)),
    )

    def change(module, x):
        assert not any(one is large for one in copied)
        module.thing[0].numpy().fill(1)
        module.thing[1][3:5] = 1
        module.thing[2][0] = 1

    model = Holder([small, large, array_], change)
    run_prepared(model, X)
    assert not small.any()
    assert not large.any()
    assert array_[0] == 1, "as the documentation says"


def test_the_settings_of_the_process_are_given_back():
    def change(module, x):
        torch.set_default_dtype(torch.float64)
        torch.set_num_threads(2)
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = not torch.backends.cudnn.benchmark
        torch.set_default_device("meta")
        torch.set_grad_enabled(True)

    def settings():
        return (
            torch.get_default_dtype(), torch.get_num_threads(), torch.get_deterministic_debug_mode(),
            torch.backends.cudnn.benchmark, torch.get_default_device(), torch.is_grad_enabled(),
        )  # fmt: skip

    torch.set_num_threads(1)
    before = settings()
    run_prepared(Holder(None, change), X)
    assert settings() == before


# What cannot be put back.


class NoKey:
    def __init__(self) -> None:
        self.counted = 0

    def __hash__(self) -> int:
        if self.counted:
            raise RuntimeError("no hash is left")
        return 1


def broken_key(module, x):
    key = NoKey()
    module.thing["keys"][key] = x
    key.counted = 1


def lock_array_below(module, x):
    array_ = module.thing["array"]
    array_[0] = 4
    array_.base.flags.writeable = False
    array_.flags.writeable = False


def give_up_memory(module, x):
    module.layer.weight.untyped_storage().resize_(0)
    raise RuntimeError("it cannot go on")


FAILURES = {
    "a key without a hash": (broken_key, "thing['keys'] (RuntimeError: no hash is left)"),
    "an array that is locked": (lock_array_below, "thing['array'] (ValueError: cannot set WRITEABLE flag"),
    "a parameter without memory": (give_up_memory, "layer.weight (ValueError: its memory was given up"),
}


@pytest.mark.parametrize("name", FAILURES)
@pytest.mark.parametrize("wrong", [False, True], ids=["else well", "else failing"])
def test_what_cannot_be_put_back_is_named_and_all_else_is_put_back(name, wrong):
    change, text = FAILURES[name]

    def both(module, x):
        module.thing["before"].append(x)
        module.thing["after"].append(x)
        module.seen.add_(1)
        torch.rand(3), np.random.rand(), random.random()
        change(module, x)
        if wrong:
            raise RuntimeError("and that besides")

    things = {"before": [], "keys": {"a": 1}, "array": np.arange(3.0)[:], "after": [1]}
    model = Holder(things, both)
    model.register_buffer("seen", torch.zeros(2))
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    with pytest.raises(ValueError, match="could not be put back") as raised:
        run_prepared(model, X)
    message = str(raised.value)
    assert text in message
    assert ("besides" in message) == (wrong and change is not give_up_memory)
    assert len(message) <= 500
    assert message.count("\n") == 0
    assert (things["before"], things["after"]) == ([], [1])
    assert not model.seen.any()
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()
    assert model.training


def test_an_interrupt_while_putting_back_waits_until_all_is_back(monkeypatch):
    things = [[index] for index in range(5)]
    interrupts = [KeyboardInterrupt()]

    def interrupted(value, content, real=held._restore_list):
        if value is things[2] and interrupts:
            raise interrupts.pop()
        real(value, content)

    ways = {**held._WAYS, list: held._keeping_items(list, interrupted)}
    monkeypatch.setattr(held, "_WAYS", ways)
    model = Holder(things, lambda module, x: [thing.append(x) for thing in module.thing])
    with pytest.raises(KeyboardInterrupt):
        run_prepared(model, X)
    assert things == [[index] for index in range(5)]
    assert not interrupts
