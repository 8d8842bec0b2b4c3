"""A model can be measured and given back exactly as it was, also when it fails half-way.

Before that, its weights are looked at: whether they are there, and hold numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FunctionType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from normfree.common.checks import check_choice
from normfree.common.process import RandomStates, one_thread_at_a_time, put_back_all, settings_of_torch
from normfree.common.text import LONGEST_PART, one_line, shortened
from normfree.common.torch_compat import DispatchMode, preserve_version_counters
from normfree.trace.held import Held, KeptTensor, place_of
from normfree.trace.inputs import values_of
from normfree.trace.operations import written_by

Mode = Literal["batch-statistics", "train", "eval"]
"""The first is evaluation mode with normalizers on the statistics of the batch, as in the first training step."""


class Preserved:
    """What must be put back: all that the model holds, and the random states and settings of the process.

    Of parameters, gradients, inputs and what is too large to be copied at once the numbers are kept only when they are
    about to be written.

    Args:
        model: the model.

    Attributes:
        tensors: all that the model holds.
    """

    def __init__(self, model: nn.Module) -> None:
        self.random, self.settings = RandomStates(), settings_of_torch()
        self.held = Held(model)
        self.tensors = [kept.value for kept in self.held.tensors]
        self.gradients = [
            KeptTensor(kept.gradient, kept, "grad") for kept in self.held.tensors if kept.gradient is not None
        ]
        self.written: list[KeptTensor] = []
        self.guarded: dict[int, list[KeptTensor]] = {}
        for kept in (*self.held.tensors, *self.gradients):
            self._guard(kept)

    def _guard(self, kept: KeptTensor) -> None:
        """Have a tensor's numbers kept before its memory is written, whichever view it is written through."""
        if kept.place and kept.copy is None:
            self.guarded.setdefault(kept.place, []).append(kept)

    def before_writing(self, tensor: Tensor) -> None:
        """Keep the numbers of what is guarded in the memory of a tensor that is about to change."""
        for kept in self.guarded.get(place_of(tensor), ()):
            if kept.copy is None:
                kept.copy_numbers()
                self.written.append(kept)

    @contextmanager
    def guarding(self, tensors: Sequence[Tensor]) -> Iterator[None]:
        """Guard tensors while the context is open, and put them back at its end; those of a batch."""
        batch = [KeptTensor(tensor, "the batch") for tensor in tensors]
        for kept in batch:
            self._guard(kept)
        try:
            yield
        finally:
            for kept in batch:
                kept.write_numbers()
                if kept.place:
                    self.guarded[kept.place].remove(kept)
            self.written = [kept for kept in self.written if kept not in batch]

    def undo(self) -> None:
        """Put back at once what was written so far, and has not been kept from the beginning."""
        for kept in self.written:
            kept.write_numbers()
            kept.copy = None
        self.written.clear()

    def seed(self, seed: int) -> None:
        """Seed every generator of the process."""
        self.random.seed(seed)

    def put_back(self) -> None:
        """Restore everything, bit for bit.

        Raises:
            ValueError: naming what could not be restored; all else is.
        """
        if failed := put_back_all([*self.held.kept, *self.gradients, *self.random.kept, *self.settings]):
            raise ValueError(
                f"model: {shortened('; '.join(failed), LONGEST_PART)} could not be put back as it was before the "
                "measurement, and all else was; measure a copy, or have the forward leave that alone"
            )

    @contextmanager
    def put_back_at_end(self) -> Iterator[None]:
        """Restore everything when the context ends, also by an error, which is told together with that of restoring."""
        try:
            yield
        except BaseException as error:
            try:
                self.put_back()
            except ValueError as left:
                if isinstance(error, Exception):
                    raise ValueError(shortened(f"{left} (after {one_line(error)})")) from error
                error.add_note(str(left))
            raise
        self.put_back()


class Writes(DispatchMode):
    """Has kept what any code writes to, such as a ``train()`` that merges weights."""

    def __init__(self, preserved: Preserved) -> None:
        super().__init__()
        self.preserved = preserved

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for target in written_by(func, args, kwargs):
            self.preserved.before_writing(target)
        return func(*args, **kwargs)


@contextmanager
def preserve_state(model: nn.Module) -> Iterator[Preserved]:
    """Put back all that a model or its forward pass changes while the context is open, which no two threads do at once.

    Parameters, buffers (running statistics included), gradients, what the modules' attributes lead to (see
    :class:`normfree.trace.held.Held`), training flags, hooks, the random states of torch, CUDA, Python and NumPy and
    torch's settings are the same bits afterwards; so are the version counters of all these tensors, so that a backward
    pass that is still to come goes through.

    Args:
        model: the model.

    Yields:
        What keeps the state; call its ``before_writing`` with tensors about to be written, or run the model in
        :class:`Writes`.

    Raises:
        ValueError: if the model is being measured in this thread already, or cannot be given back as it was.
    """
    with one_thread_at_a_time():
        if any(model is one for one in _running):
            raise ValueError(
                f"model: {type(model).__name__} is being measured already, and its forward, or a hook, has asked for "
                "it again; measure it before or afterwards"
            )
        preserved, outer = Preserved(model), len(_running)
        counted = tuple(tensor for tensor in preserved.tensors if not tensor.is_inference())
        try:
            _running.append(model)
            with preserve_version_counters(counted), preserved.put_back_at_end():
                yield preserved
        finally:
            del _running[outer:]


_running: list[nn.Module] = []
"""What the thread whose turn it is measures: a model, and what is measured from within its forward."""


@contextmanager
def preserve_model(model: nn.Module, mode: Mode) -> Iterator[Preserved]:
    """Put a model into a measuring mode, and put it back as :func:`preserve_state` says.

    Args:
        model: the model.
        mode: one of :data:`Mode`.
    """
    check_choice("mode", mode, Mode)
    with preserve_state(model) as preserved:
        torch.backends.mha.set_fastpath_enabled(False)  # the fused encoder layer would hide its additions
        with Writes(preserved):
            try:
                model.train(mode == "train")
            except Exception as error:  # of a class that has a train() of its own, or an exported graph
                raise ValueError(
                    f"model: {type(model).__name__} cannot be put into another mode, for its train() fails with "
                    f"{one_line(error)}; give the module that it was made of, or mend that method"
                ) from error
        if mode == "batch-statistics":
            for module in model.modules():
                if _keeps_statistics(module):
                    module.training = True  # not .train(): a fused norm may hold dropout
        yield preserved


def _keeps_statistics(module: nn.Module) -> bool:
    """Whether a module normalizes by statistics that it keeps in training, under whatever names.

    It has torch's ``running_mean``; or its own code asks whether it is training, and it has two buffers of one shape, a
    mean and a variance.
    """
    if isinstance(getattr(module, "running_mean", None), Tensor):
        return True
    shapes = [tuple(buffer.shape) for buffer in module.buffers(recurse=False) if buffer.is_floating_point()]
    if all(shapes.count(shape) < 2 for shape in shapes):
        return False
    functions = (value for kind in type(module).__mro__ if kind is not nn.Module for value in vars(kind).values())
    return any("training" in function.__code__.co_names for function in functions if isinstance(function, FunctionType))


def check_present(model: nn.Module) -> None:
    """Refuse a model with parameters or buffers that are not there yet, without values, or that no gradient can reach.

    Raises:
        ValueError: naming the first.
    """
    __tracebackhide__ = True
    for kind, tensors in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        for name, tensor in tensors:
            if is_lazy(tensor):
                raise ValueError(f"model: {kind} {name!r} is not initialised yet; run one batch through the lazy model")
            if tensor.is_meta and kind == "parameter":  # a buffer without values may be one that is never read
                raise ValueError(
                    f"model: parameter {name!r} is on the meta device, without values; initialise it first"
                )
            if kind == "parameter" and tensor.is_inference():
                raise ValueError(
                    f"model: parameter {name!r} was made inside of torch.inference_mode, and can have no gradient; "
                    "build the model outside of it, or give copy.deepcopy(model)"
                )


def check_finite(model: nn.Module) -> None:
    """Refuse a model with parameters that are not finite.

    Raises:
        ValueError: naming the first.
    """
    __tracebackhide__ = True
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and (bad := int((~torch.isfinite(values_of(parameter))).sum())):
            raise ValueError(
                f"model: parameter {name!r} has {bad} of {parameter.numel()} values that are not finite; "
                "initialise it, or load a sound checkpoint"
            )


def check_statistics(model: nn.Module) -> None:
    """Refuse running statistics that no data have: a mean or variance that is not finite, a negative variance.

    An infinite variance would make a normalizer's output its bias, whatever the input: finite, and wrong.

    Raises:
        ValueError: naming the first.
    """
    __tracebackhide__ = True
    for name, buffer in model.named_buffers():
        kind = name.rpartition(".")[2]
        if kind in ("running_mean", "running_var"):
            wrong = ~torch.isfinite(buffer) if kind == "running_mean" else ~(torch.isfinite(buffer) & (buffer >= 0))
            if bad := int(wrong.sum()):
                raise ValueError(
                    f"model: buffer {name!r} has {bad} of {buffer.numel()} values that no statistic has (not finite, "
                    "or a negative variance); load a sound checkpoint"
                )
